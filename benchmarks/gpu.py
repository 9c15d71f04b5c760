"""Padded tokens per second of a BERT of 110 million parameters on one GPU, in bf16."""

import argparse
import csv
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    PRECISION,
    add_model_option,
    at_least,
    gemm_peak,
    in_turn,
    median,
    model_flops,
    model_folder,
    peer,
    round_peaks,
    save,
    say,
    spread,
    table,
    train_py,
)

LOGGED, WARM_UP = 10, 20  # updates between two logs; first updates that are not timed
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("train.py", {}),
    "ours_compiled": ("train.py, torch_compile", {"torch_compile": "true"}),
    "ours_flash": ("train.py, dropout_mode torch (flash attention)", {"dropout_mode": "torch"}),
    "ours_flash_compiled": (
        "train.py, dropout_mode torch (flash attention), torch_compile",
        {"dropout_mode": "torch", "torch_compile": "true"},
    ),
    "trainer": ("Trainer", {}),
    "trainer_compiled": ("Trainer, torch_compile", {"torch_compile": True}),
}
QUICK = {"rounds": 1, "lengths": [128]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_model_option(parser, "--tokenizer", "of its vocabulary the model is made, at random")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 384], help="tokens of every row")
    parser.add_argument("--tokens", type=int, default=32_768, help="per update, approximately")
    parser.add_argument(
        "--updates", type=at_least(WARM_UP + LOGGED), default=60, help=f"per run; {WARM_UP} are not counted"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))


def run(options: argparse.Namespace) -> None:
    """Every length and arm in turn, each in a fresh process, round by round."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here")
    os.environ[PRECISION] = options.precision = "bf16"
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "bert", model_folder(options.tokenizer), max(options.lengths))
        measured: dict[str, list[float]] = {}
        gemm = [gemm_peak(8192, dtype=torch.bfloat16)]
        for number in range(options.rounds):
            for length in options.lengths:
                rows = max(8, options.tokens // length // 8 * 8)
                train = make_texts(
                    Path(folder) / f"{length}.csv", model, rows * (options.updates + 1), length
                )
                for arm in in_turn(options.arms, number):
                    speed = measure(arm, model, train, length, rows, options.updates, 42 + number)
                    measured.setdefault(f"{length} {arm}", []).append(speed)
                    say(f"round {number + 1}, {length} tokens, {arm}: {speed:,.0f} tokens/s")
            gemm.append(gemm_peak(8192, dtype=torch.bfloat16))
            save(options, _text(options, model, measured, gemm), measured, gemm)


def make_model(folder: Path, tokenizer_folder: str, longest: int) -> str:
    """A BERT of the base size with random weights, and a tokenizer that cuts at no less than `longest`."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, model_max_length=max(512, longest))
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=max(512, longest))
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_texts(path: Path, model: str, rows: int, length: int) -> Path:
    """Rows of random words, each longer than `length` tokens, so that all are cut and none is padded."""
    from transformers import AutoTokenizer

    words = [word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalpha()]
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((" ".join(draw.choices(words, k=length)), "ab"[row % 2]) for row in range(rows))
    return path


def measure(arm: str, model: str, train: Path, length: int, rows: int, updates: int, seed: int) -> float:
    """Tokens per second of the updates of a run after the warm-up."""
    words = ARMS[arm][1]
    if arm.startswith("trainer"):
        shared = {"model": model, "train": train, "max_length": length, "learning_rate": 5e-5}
        found = peer(
            "trainer", batch=rows, updates=updates, seed=seed, bf16=True, wait_every=LOGGED, **shared, **words
        )
        steps = found["steps"][WARM_UP : updates // LOGGED * LOGGED]
        return sum(step["positions"] for step in steps) / sum(step["seconds"] for step in steps)
    flags = {
        "model_name_or_path": model, "train_file": train, "validation_split_percentage": 0,
        "max_length": length, "global_batch_size": rows, "max_train_steps": updates,
        "logging_steps": LOGGED, "eval_strategy": "no", "save_strategy": "no", "seed": seed,
        "learning_rate": 5e-5,
    }  # fmt: skip
    logged = train_py({**flags, **words})["rows"][WARM_UP // LOGGED : updates // LOGGED]
    return rows * length * len(logged) / sum(rows * length / row["perf/tokens_per_second"] for row in logged)


def _text(
    options: argparse.Namespace, model: str, measured: dict[str, list[float]], gemm: list[float]
) -> str:
    lines = []
    for place, speeds in measured.items():
        length, arm = place.split()
        flops = [model_flops(model, 1, int(length)) * speed for speed in speeds]
        shares = [one / peak / 1e9 for one, peak in zip(flops, round_peaks(gemm), strict=True)]
        ours = zip(measured.get(f"{length} ours_compiled", []), speeds, strict=False)
        lines.append(
            [
                f"{length} tokens, {ARMS[arm][0]}",
                f"{median(speeds):,.0f}",
                spread(speeds, 0),
                f"{median(flops) / 1e12:,.0f}",
                f"{median(shares):.0%}",
                f"{median([one / other for one, other in ours]):.2f}",
            ]
        )
    header = ["", "tokens/s, median", "min to max", "TFLOP/s", "of the bf16 GEMM peak", "compiled / this one"]
    return (
        f"{table(header, lines)}\n\nbf16 mixed precision, {options.updates - WARM_UP} updates a run after "
        f"{WARM_UP} that do not count, a fresh process a run; the GPU is waited for after every {LOGGED}. "
        "Random weights and words; no row is padded. "
        "Of the GEMM peak: the median over the rounds, the peak of each being the higher of the samples "
        "before and after it."
    )
