"""What grows with the work: memory over updates and over evaluated rows, time and memory of a plan."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_data_options,
    at_least,
    class_file,
    column_flags,
    command_line,
    gemm_peak,
    launch_and_weigh,
    median,
    model_folder,
    read_csv,
    save,
    say,
    started,
    table,
    write_csv,
)

BATCH, LOGGED, POLL_SECONDS = 8, 100, 0.05
WARM_UP = 1000  # updates, until each text length has occurred
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
PROCESSES, GLOBAL_BATCH, PLANNED_UPDATES = (2, 4, 8), 256, 1000
QUICK = {"updates": 1500, "evaluated": [500, 5000], "planned": 1_000_000}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--max_length", type=int, default=64, help="longest text in tokens")
    parser.add_argument("--updates", type=at_least(WARM_UP + 2 * LOGGED), default=10_000)
    parser.add_argument("--evaluated", type=at_least(1), nargs="+", default=[2000, 20_000, 60_000])
    parser.add_argument("--planned", type=at_least(GLOBAL_BATCH), default=10_000_000, help="rows of the plan")


def run(options: argparse.Namespace) -> None:
    """A run of a small random model, its evaluations of more and more rows, and a plan of many rows."""
    train = class_file(options.data, "train")
    measured: dict[str, Any] = {"plan": _plan(options.planned)}
    say(str(measured["plan"]))
    gemm = [gemm_peak()]
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / "run"
        measured["training"] = _training(options, train, _small_model(options.model, folder), output_dir)
        measured["evaluation"] = {}
        for rows in options.evaluated:
            path = Path(folder) / f"{rows}.csv"
            texts, labels = read_csv(train)
            places = [row % len(texts) for row in range(rows)]
            write_csv(path, [texts[place] for place in places], [labels[place] for place in places])
            words = {
                "model_name_or_path": output_dir / "final", "test_file": path,
                "output_dir": Path(folder) / path.stem, "max_length": options.max_length,
                **column_flags(path),
            }  # fmt: skip
            _, measured["evaluation"][rows] = launch_and_weigh("eval.py", *command_line(words))
            say(f"{rows:,} rows evaluated: {measured['evaluation'][rows] / 1e6:,.0f} MB")
    save(options, _text(options, measured), measured, [*gemm, gemm_peak()])


def _small_model(name: str, folder: str) -> Path:
    """A random BERT, so that many updates take minutes."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    path = Path(folder) / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
    tokenizer.save_pretrained(path)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SMALL)).save_pretrained(path)
    return path


def _training(options: argparse.Namespace, train: Path, model: Path, output_dir: Path) -> dict[str, int]:
    """The resident memory of train.py after each log, by its update."""
    import psutil

    flags = {
        "model_name_or_path": model, "train_file": train, "output_dir": output_dir,
        "max_length": options.max_length, "global_batch_size": BATCH, "max_train_steps": options.updates,
        "logging_steps": LOGGED, "eval_strategy": "no", "save_strategy": "no",
        "validation_split_percentage": 0, **column_flags(train),
    }  # fmt: skip
    log, weighed = output_dir / "metrics.jsonl", {}
    with tempfile.TemporaryFile("w+") as out:
        words = command_line(flags, options.extra)
        with started("train.py", *words, stdout=out, stderr=out) as process:
            of_process = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                lines = log.read_text().splitlines() if log.exists() else []
                if lines and (step := json.loads(lines[-1])["step"]) not in weighed:
                    weighed[step] = of_process.memory_info().rss
        if process.returncode:
            out.seek(0)
            raise SystemExit(f"error: train.py failed:\n{out.read()}")
    say(f"{options.updates:,} updates: {json.dumps(weighed)}")
    return weighed


def _plan(rows: int) -> dict[str, Any]:
    """Seconds and bytes of one epoch's plan of texts as long as reviews, and the largest share of an update's
    tokens, relative to the mean share, for some numbers of processes."""
    import tracemalloc

    import numpy as np

    from ft.data.plan import plan, shares

    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.8, rows), 4, 512).astype(np.int32)
    begin = time.perf_counter()
    made = plan(lengths, GLOBAL_BATCH, 42, 0)
    seconds = time.perf_counter() - begin
    tracemalloc.start()
    plan(lengths, GLOBAL_BATCH, 42, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest, shared_updates = {}, min(PLANNED_UPDATES, rows // GLOBAL_BATCH)
    for processes in PROCESSES:
        ratios = []
        for update in range(shared_updates):
            taken = made.rows(update)
            parts = shares(taken, lengths[taken], processes, GLOBAL_BATCH // processes)
            tokens = [sum(lengths[part[rank]].sum() for part in parts) for rank in range(processes)]
            ratios.append(float(max(tokens) / np.mean(tokens)))
        largest[processes] = max(ratios)
    return {
        "rows": rows, "seconds": seconds, "bytes_a_row": made.order.nbytes / rows, "peak_bytes": peak / rows,
        "largest_share": largest, "shared_updates": shared_updates,
    }  # fmt: skip


def _text(options: argparse.Namespace, measured: dict[str, Any]) -> str:
    weighed = {step: size / 1e6 for step, size in measured["training"].items() if step > WARM_UP}
    half = len(weighed) // 2
    first, second = list(weighed.values())[:half], list(weighed.values())[half:]
    rows = [
        [
            f"resident memory, updates {min(weighed):,} to {list(weighed)[half - 1]:,}, MB",
            f"{median(first):,.1f}",
        ],
        [f"the same, to {max(weighed):,}", f"{median(second):,.1f}"],
        *(
            [f"peak memory of eval.py, {int(count):,} rows, MB", f"{size / 1e6:,.0f}"]
            for count, size in measured["evaluation"].items()
        ),
    ]
    planned = measured["plan"]
    rows += [
        [f"an epoch of {planned['rows']:,} rows planned, seconds", f"{planned['seconds']:.2f}"],
        ["bytes a row of that plan", f"{planned['bytes_a_row']:.0f}"],
        ["the same while it is made", f"{planned['peak_bytes']:.0f}"],
        *(
            [f"largest share of an update's tokens by the mean, {processes} processes", f"{share:.3f}"]
            for processes, share in planned["largest_share"].items()
        ),
    ]
    return (
        f"{table(['', 'measured'], rows)}\n\n"
        f"A random BERT of two layers, {options.updates:,} updates of {BATCH} rows; memory after each log of "
        f"{LOGGED} updates, the median of each half of those after {WARM_UP:,}. The rows that are evaluated "
        f"are those of {options.data.name} over again. Planned are lengths as of reviews (log-normal, 4 to "
        f"512 tokens) at global batch {GLOBAL_BATCH}; the shares are of {planned['shared_updates']:,} "
        "updates, in one micro-batch a process, which gives each as many rows."
    )
