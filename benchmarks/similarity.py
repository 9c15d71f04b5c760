"""Test Spearman of pair similarity: fine-tuned directly, or first on pairs that an encoder scored.

The first stage is Augmented SBERT (Thakur et al., 2021) in reverse: a sentence encoder's cosine of two
training sentences is the target of the model that reads both at once. No sentence of a validation or test row
is used for it."""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    PAIR,
    add_model_option,
    data_file,
    gemm_peak,
    mean_and_deviation,
    model_folder,
    read_csv,
    save,
    say,
    table,
    train_py,
)

ARMS = {"first": "after an epoch on pairs that the encoder scored", "plain": "at once"}
SPLITS = ("train", "validation", "test")
SHARED: dict[str, Any] = {
    "text_column_names": ",".join(PAIR), "label_column_name": "score", "problem_type": "regression",
    "config_overrides": "hidden_dropout_prob=0,attention_probs_dropout_prob=0", "global_batch_size": 32,
    "weight_decay": 0.01, "save_strategy": "no",
}  # fmt: skip
NEAR, LESS_NEAR = 4, 40  # a sentence is paired with two of the nearest, one less near and one of all
QUICK = {"epochs": 1, "sentences": 200}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of train, validation and test.csv with two sentences and a score",
    )
    add_model_option(parser, about="sentence encoder whose mean over tokens was trained")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--first_learning_rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--sentences", type=int, help="fewer sentences for the first stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))


def run(options: argparse.Namespace) -> None:
    """Each seed trains each arm; the best epoch on the validation rows is scored on test."""
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    files = {f"{split}_file": data_file(options.data, split) for split in SPLITS}
    names = [*(f"test/spearmanr{end}" for end in ("", "_low", "_high")), "best/spearmanr"]
    gemm = [gemm_peak()]
    with tempfile.TemporaryDirectory() as made:
        pairs = Path(made) / "pairs.csv"
        if "first" in options.arms:
            _score(options, pairs)
        for seed in options.seeds:
            for arm in options.arms:
                flags = {**SHARED, "seed": seed, "model_name_or_path": options.model}
                if arm == "first":
                    first = flags | {
                        "train_file": pairs, "validation_split_percentage": 0, "num_train_epochs": 1,
                        "learning_rate": options.first_learning_rate, "warmup_ratio": 0.06,
                    }  # fmt: skip
                    train_py(first, output_dir=Path(made) / f"{seed}")
                    flags["model_name_or_path"] = str(Path(made) / f"{seed}" / "final")
                flags |= {
                    **files, "num_train_epochs": options.epochs, "learning_rate": options.learning_rate,
                    "warmup_ratio": 0.1, "eval_strategy": "epoch",
                }  # fmt: skip
                found = train_py(flags, options.extra)
                measured[arm].append({"seed": seed} | {name: found[name] for name in names})
                say(f"{arm}: {measured[arm][-1]}")
            gemm.append(gemm_peak())
            save(options, _text(measured), measured, gemm)


def _score(options: argparse.Namespace, path: Path) -> None:
    """Write pairs of training sentences, near and far, with five times the cosine of their embeddings."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts, _ = read_csv(data_file(options.data, "train"))
    sentences = sorted({text for pair in texts for text in pair}, key=lambda text: (len(text), text))
    sentences = sentences[: options.sentences]
    folder = model_folder(options.model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(sentences), 128):
        batch = sentences[start : start + 128]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        seen = inputs["attention_mask"].unsqueeze(-1)
        parts.append(torch.nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=1))
    vectors = torch.cat(parts)
    cosines = (vectors @ vectors.T).fill_diagonal_(-2)
    nearest = cosines.topk(min(LESS_NEAR, len(sentences) - 1), dim=1).indices.numpy()
    draw, pairs = np.random.default_rng(0), set()
    for one, near in enumerate(nearest):
        some = [*draw.choice(near[:NEAR], 2, replace=False), draw.choice(near[NEAR:])]
        for other in map(int, [*some, draw.integers(len(sentences))]):
            if other != one and (other, one) not in pairs:
                pairs.add((one, other))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*PAIR, "score"])
        for pair in sorted(pairs):
            one, other = reversed(pair) if draw.random() < 0.5 else pair
            writer.writerow([sentences[one], sentences[other], round(5 * float(cosines[one, other]), 4)])


def _text(measured: dict[str, list[dict[str, Any]]]) -> str:
    header = ["", "test Spearman", "95 % interval of the first seed", "validation"]
    rows = []
    for arm, runs in measured.items():
        test, best = ([one[name] for one in runs] for name in ("test/spearmanr", "best/spearmanr"))
        interval = f"{runs[0]['test/spearmanr_low']:.4f} to {runs[0]['test/spearmanr_high']:.4f}"
        rows.append([ARMS[arm], mean_and_deviation(test, 4), interval, mean_and_deviation(best, 4)])
    said = "Batch 32, no dropout, linear schedule; the epoch that is best on validation is scored on test."
    return f"{table(header, rows)}\n\n{said}"
