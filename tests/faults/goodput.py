"""What kills cost: `python tests/faults/goodput.py --minutes 10 --kills 5`, with nothing else on the machine.

A run of two processes on a random model of MiniLM's size is repeatedly killed by SIGKILL, and restarted by
the same command. Writes docs/goodput.json, and its lines in docs/reliability.md."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import conftest  # noqa: E402
from conftest import ROOT, TORCHRUN, flags, make_rows, metrics_of, write_csv  # noqa: E402
from fault_table import with_goodput  # noqa: E402

from ft.launch import kill_launch  # noqa: E402

BATCH, ROWS = 32, 640  # every update has a full batch
SAVE_EVERY, EVALUATE_EVERY = 25, 100  # updates


def make_model(folder):
    """A random BERT of six layers of 384, with the tokenizer of the tests."""
    from transformers import BertConfig, BertModel

    conftest.make_tiny_model(folder)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = BertConfig(
        vocab_size=words, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def start(model, data, folder):
    """Run the same command again; its output goes to a file beside its folder."""
    words = flags(
        model_name_or_path=model, train_file=data / "train.csv", validation_file=data / "validation.csv",
        output_dir=folder, global_batch_size=BATCH, max_train_steps=100_000, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=SAVE_EVERY, save_total_limit=2,
        eval_strategy="steps", eval_steps=EVALUATE_EVERY, resume_from_checkpoint="latest",
    )  # fmt: skip
    return subprocess.Popen(
        [*TORCHRUN, "2", str(ROOT / "train.py"), *words], cwd=ROOT, start_new_session=True,
        stdout=open(folder.with_suffix(".said"), "a"), stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_an_update(path, process, old, end):
    """Seconds from now to the first row that the new process writes; None if there is none by `end`. The
    process creates a new file (not `old`) when it begins."""
    begin, before = time.monotonic(), None
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.stat().st_ino != old:
            rows = path.read_bytes().count(b"\n")
            if before is not None and rows > before:
                return time.monotonic() - begin
            before = rows if before is None else min(before, rows)
        time.sleep(0.01)
    if process.poll() is not None:
        said = path.parent.with_suffix(".said").read_text()[-4000:]
        sys.exit(f"error: the run ended by itself with {process.returncode}:\n{said}")
    return None


def measure(minutes, kills, place):
    """Run for `minutes` with `kills` evenly spaced kills; returns what was measured."""
    model, data, folder = place / "model", place / "data", place / "run"
    make_model(model)
    write_csv(data / "train.csv", make_rows(ROWS, 0))
    write_csv(data / "validation.csv", make_rows(61, 1))
    path, restarts, began = folder / "metrics.jsonl", [], time.monotonic()
    for number in range(kills + 1):
        old = path.stat().st_ino if path.exists() else None
        process = start(model, data, folder)
        end = began + 60 * minutes * (number + 1) / (kills + 1)
        seconds = wait_for_an_update(path, process, old, end)
        print(f"start {number}: {seconds and round(seconds, 1)} s to its first update", flush=True)
        if number:
            restarts.append(seconds)
        time.sleep(max(0.0, end - time.monotonic()))
        if number == kills:
            process.send_signal(signal.SIGTERM)  # both processes save their last update
            process.wait(timeout=120)
        kill_launch(process)
    seconds = time.monotonic() - began
    counted = [BATCH / r["perf/examples_per_second"] for r in metrics_of(folder) if "train/loss" in r]
    return {
        "seconds": round(seconds, 1), "kills": kills, "save_steps": SAVE_EVERY, "updates": len(counted),
        "goodput": round(sum(counted) / seconds, 4),
        "seconds_per_update": round(statistics.median(counted), 3),
        "restart_seconds": [s and round(s, 1) for s in restarts], "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main():
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_HOME"] = str(Path(place) / "hf-home")
        seen = measure(options.minutes, options.kills, Path(place))
    print(json.dumps(seen))
    (options.docs / "goodput.json").write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    table = options.docs / "reliability.md"
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    table.write_text(with_goodput(text, options.docs), encoding="utf-8")


if __name__ == "__main__":
    main()
