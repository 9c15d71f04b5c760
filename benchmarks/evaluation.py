"""Rows per second of an evaluation, against transformers.Trainer.evaluate at its defaults."""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_data_options,
    at_least,
    class_file,
    column_flags,
    gemm_peak,
    in_turn,
    launch_and_weigh,
    median,
    median_and_spread,
    model_folder,
    own_cache,
    peak_shares,
    peer,
    save,
    say,
    spread,
    table,
    text_lengths,
)

QUICK = {"rounds": 1, "repeats": 2}
ARMS = {"ours": "train.py's evaluation", "trainer": "Trainer.evaluate at its defaults"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--max_length", type=int, default=256, help="longest text in tokens")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument(
        "--repeats", type=at_least(2), default=3, help="evaluations per process; the first does not count"
    )


def run(options: argparse.Namespace) -> None:
    """Both arms in turn on the rows of test.csv (validation.csv), each in a fresh process."""
    rows = class_file(options.data, "test", "validation")
    lengths = text_lengths(options.model, rows, options.max_length)
    known = {"tokens": sum(lengths), "squares": sum(length**2 for length in lengths)}
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    gemm = [gemm_peak()]
    for number in range(options.rounds):
        shared: dict[str, Any] = {"max_length": options.max_length, "repeats": options.repeats}
        shared |= {"model": model_folder(options.model), "rows": str(rows)}
        for arm in in_turn(list(ARMS), number):
            found = (_ours if arm == "ours" else _trainer)(shared)
            seconds = median(found.pop("seconds")[1:])
            measured[arm].append(found | known | {"seconds": seconds, "rows": len(lengths)})
            say(f"round {number + 1}, {arm}: {len(lengths) / seconds:,.1f} rows/s")
        gemm.append(gemm_peak())
        save(options, _text(options, measured, gemm), measured, gemm)


def _ours(shared: dict[str, Any]) -> dict[str, Any]:
    out, peak = launch_and_weigh("-m", "benchmarks.evaluation", json.dumps(shared))
    return json.loads(out.splitlines()[-1]) | {"peak_bytes": peak}


def _trainer(shared: dict[str, Any]) -> dict[str, Any]:
    return peer("trainer_evaluation", **shared)


def _text(options: argparse.Namespace, measured: dict[str, list[dict[str, float]]], gemm: list[float]) -> str:
    rows = []
    for arm, runs in measured.items():
        speeds = [one["rows"] / one["seconds"] for one in runs]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(measured["ours"], runs, strict=True)]
        # The shares are of a whole update, of which a forward pass is a third.
        percent = [share / 3 for share in peak_shares(options.model, runs, gemm)]
        rows.append(
            [
                ARMS[arm],
                f"{median(speeds):,.1f}",
                spread(speeds, 1),
                f"{median([one['tokens'] / one['seconds'] for one in runs]):,.0f}",
                f"{median([1 - one['tokens'] / one['positions'] for one in runs]):.1%}",
                median_and_spread(percent, 1),
                median_and_spread([one["peak_bytes"] / 1e6 for one in runs], 0),
                "" if arm == "ours" else median_and_spread(ratios, 2),
            ]
        )
    header = ["", "rows/s, median", "min to max", "real tokens/s", "padding", "% of the GEMM peak"]
    header += ["peak memory, MB", "ours / this one"]
    return (
        f"{table(header, rows)}\n\n"
        f"A fresh process a run, {options.repeats - 1} evaluations in it after one that does not count; "
        f"rounds done: {len(measured['ours'])}. Ours sorts all rows by length; the Trainer takes 8 as they "
        "come. The share of the GEMM peak is that of a forward pass, a third of `model_flops` in common.py."
    )


def ours(model: str, rows: str, max_length: int, repeats: int) -> dict[str, Any]:
    """Seconds of repeated `ft.evaluation.evaluate`, with the model as train.py prepares it, but with all word
    embeddings; and its positions, including padding."""
    from ft.config import Config
    from ft.runtime import set_environment

    config = Config(
        model_name_or_path=model, train_file=rows, validation_split_percentage=0, output_dir="-",
        report_to="none", **column_flags(Path(rows)),
    )  # fmt: skip
    set_environment(config)
    from ft.data.loader import EvaluationSampler, RowDataset, build_loader
    from ft.data.prepare import prepare_data
    from ft.evaluation import evaluate
    from ft.invariance import key_dropout
    from ft.model import build_model
    from ft.pretrained import load_model_config, load_tokenizer
    from ft.report import progress_bar
    from ft.runtime import build_accelerator
    from ft.tasks import build_task

    accelerator, task = build_accelerator(config), build_task(config)
    model_config = load_model_config(config)
    tokenizer = load_tokenizer(config, model_config)
    data = prepare_data(config, task, tokenizer, max_length, lambda **_: progress_bar(False))
    encoded = data.splits["train"]
    network = build_model(config, task, model_config, tokenizer, [])
    key_dropout(network, config.dropout_mode, config.seed)
    dataset = RowDataset(encoded, tokenizer)
    sampler = EvaluationSampler(dataset, config.per_device_eval_batch_size, accelerator.num_processes)
    network, loader = accelerator.prepare(network, build_loader(dataset, sampler, 0, accelerator.device))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        evaluate(accelerator, task, network, loader, encoded, None, lambda _: None)
        seconds.append(time.perf_counter() - begin)
    positions = sum(math.prod(encoded.padded_shape(slot.rows, dataset.multiple)) for slot in sampler)
    return {"seconds": seconds, "positions": positions}


if __name__ == "__main__":
    from ft.heap import start_again

    start_again()  # with train.py's heap
    with tempfile.TemporaryDirectory() as cache, own_cache(cache):
        print(json.dumps(ours(**json.loads(sys.argv[1]))))
