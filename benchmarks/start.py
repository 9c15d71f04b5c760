"""Seconds from the start of the process to the end of the first update, and to the answer to --help."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NoReturn

from benchmarks.common import (
    at_least,
    command_line,
    gemm_peak,
    in_turn,
    launch,
    median,
    median_and_spread,
    model_folder,
    save,
    say,
    spread,
    started,
    table,
)

RECIPE = "ft/recipes/quickstart.yaml"
ONE_UPDATE = {"max_train_steps": 1, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
POLL_SECONDS = 0.005
PAIRS = {
    "first update": ("train.py, quickstart, encoding cached", "bare script, random batch of the same shape"),
    "help": ("train.py --help", 'python -c "import yaml"'),
}
BARE = """
import json, sys
import torch, transformers, accelerate

path, rows, tokens, classes = json.loads(sys.argv[1])
accelerator = accelerate.Accelerator()
model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)
model.train()
ids = torch.randint(model.config.vocab_size, (rows, tokens), device=accelerator.device)
labels = torch.randint(classes, (rows,), device=accelerator.device)
accelerator.backward(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss)
optimizer.step()
print(float(next(model.parameters())[0, 0]), flush=True)
"""
QUICK = {"rounds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--rounds", type=at_least(1), default=5)


def run(options: argparse.Namespace) -> None:
    """Each pair in turn, round by round, after one run of each that is not counted."""
    shape = _prepare(options.extra)
    measured: dict[str, dict[str, list[float]]] = {
        pair: {name: [] for name in names} for pair, names in PAIRS.items()
    }
    gemm = [gemm_peak()]
    for number in range(options.rounds + 1):
        for pair, arms in {
            "first update": (lambda: _ours(options.extra), lambda: _bare(shape)),
            "help": (lambda: _whole("train.py", "--help"), lambda: _whole("-c", "import yaml")),
        }.items():
            measure = dict(zip(PAIRS[pair], arms, strict=True))
            for name in in_turn(PAIRS[pair], number):
                seconds = measure[name]()
                if number:  # the first round fills the system's caches
                    measured[pair][name].append(seconds)
                say(f"round {number}, {name}: {seconds:.2f} s")
        if number:
            gemm.append(gemm_peak())
            save(options, _text(shape, measured), measured, gemm)


def _prepare(extra: list[str]) -> list[Any]:
    """Encode the quickstart's texts into the cache, and return its model folder and the shape of its batch:
    rows, tokens, classes."""
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        launch("train.py", RECIPE, *command_line(ONE_UPDATE | {"output_dir": folder}, extra))
        config = yaml.safe_load((Path(folder) / "config.yaml").read_text())
        classes = len(json.loads((Path(folder) / "final" / "config.json").read_text())["id2label"])
    return [
        model_folder(config["model_name_or_path"]),
        config["global_batch_size"],
        config["max_length"],
        classes,
    ]


def _fail(what: str, process: subprocess.Popen, err: IO[str]) -> NoReturn:
    err.seek(0)
    sys.exit(f"error: {what} ended with {process.returncode}:\n{err.read()}")


def _ours(extra: list[str]) -> float:
    """Seconds until train.py has logged its first update; then it is stopped."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as err:
        log = Path(folder) / "metrics.jsonl"
        words = ["train.py", RECIPE, *command_line(ONE_UPDATE | {"output_dir": folder}, extra)]
        begin = time.perf_counter()
        with started(*words, stdout=subprocess.DEVNULL, stderr=err) as process:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    _fail("before its first update, train.py", process, err)
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - begin
            process.kill()
            process.wait()
    return seconds


def _bare(shape: list[Any]) -> float:
    """Seconds until the bare script has printed a number of the updated model."""
    with tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        with started("-c", BARE, json.dumps(shape), stdout=subprocess.PIPE, stderr=err) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - begin
            process.communicate()
            if not line or process.returncode:
                _fail("the bare script", process, err)
    return seconds


def _whole(*words: str) -> float:
    """Seconds of a process from start to end."""
    with tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        with started(*words, stdout=subprocess.DEVNULL, stderr=err) as process:
            if process.wait():
                _fail(f"python {' '.join(words)}", process, err)
            return time.perf_counter() - begin


def _text(shape: list[Any], measured: dict[str, dict[str, list[float]]]) -> str:
    rows = []
    for arms in measured.values():
        ours, base = arms.values()
        ratios = [a / b for a, b in zip(ours, base, strict=True)]
        more = [a - b for a, b in zip(ours, base, strict=True)]
        for name, seconds in arms.items():
            shown = (
                [median_and_spread(ratios, 2), median_and_spread(more, 2)] if seconds is ours else ["", ""]
            )
            rows.append([name, f"{median(seconds):.2f}", spread(seconds, 2), *shown])
    header = ["", "seconds, median", "min to max", "ratio to the next line", "seconds more than it"]
    return (
        f"{table(header, rows)}\n\n"
        f"From the start of the process; the batch is {shape[1]} x {shape[2]} tokens. In turn, "
        f"{len(rows and next(iter(measured['help'].values())))} rounds after one that does not count; the "
        "ratio is the median of the ratios of each round, and so is the difference."
    )
