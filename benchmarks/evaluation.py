"""Rows a second of an evaluation, against transformers.Trainer.evaluate at its defaults."""

import argparse
import json
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
    launch,
    median,
    median_and_spread,
    model_folder,
    own_cache,
    peer,
    save,
    say,
    spread,
    table,
)

QUICK = {"rounds": 1, "repeats": 2}
ARMS = {"ours": "train.py's evaluation", "trainer": "Trainer.evaluate at its defaults"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--max_length", type=int, default=256, help="longest text in tokens")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument(
        "--repeats", type=at_least(2), default=3, help="evaluations a process; the first does not count"
    )


def run(options: argparse.Namespace) -> None:
    """Both arms in turn on the rows of test.csv (validation.csv), in a fresh process each."""
    rows = class_file(options.data, "test", "validation")
    measured: dict[str, list[float]] = {arm: [] for arm in ARMS}
    gemm = [gemm_peak()]
    for number in range(options.rounds):
        shared: dict[str, Any] = {"max_length": options.max_length, "repeats": options.repeats}
        shared |= {"model": model_folder(options.model), "rows": str(rows)}
        for arm in in_turn(list(ARMS), number):
            if arm == "ours":
                found = json.loads(launch("-m", "benchmarks.evaluation", json.dumps(shared)).splitlines()[-1])
            else:
                found = peer("trainer_evaluation", **shared)
            measured[arm].append(median(found["rows_per_second"][1:]))
            say(f"round {number + 1}, {arm}: {measured[arm][-1]:,.1f} rows/s")
        gemm.append(gemm_peak())
        save(options, _text(options, measured), measured, gemm)


def _text(options: argparse.Namespace, measured: dict[str, list[float]]) -> str:
    ratios = [ours / theirs for ours, theirs in zip(measured["ours"], measured["trainer"], strict=True)]
    rows = [
        [
            ARMS[arm],
            f"{median(speeds):,.1f}",
            spread(speeds, 1),
            "" if arm == "ours" else median_and_spread(ratios, 2),
        ]
        for arm, speeds in measured.items()
    ]
    return (
        f"{table(['', 'rows/s, median', 'min to max', 'ours / this one'], rows)}\n\n"
        f"A fresh process a run, {options.repeats - 1} evaluations in it after one that does not count; "
        f"rounds done: {len(ratios)}. Ours sorts all rows by length; the Trainer takes 8 as they come."
    )


def ours(model: str, rows: str, max_length: int, repeats: int) -> list[float]:
    """Rows a second of `ft.evaluation.evaluate`, time after time, with the model as train.py prepares it."""
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
    return [len(encoded) / one for one in seconds]


if __name__ == "__main__":
    from ft.heap import start_again

    start_again()  # with train.py's heap
    with tempfile.TemporaryDirectory() as cache, own_cache(cache):
        print(json.dumps({"rows_per_second": ours(**json.loads(sys.argv[1]))}))
