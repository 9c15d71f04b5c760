"""SIGKILL at random moments: `python tests/faults/random_kills.py --kills 50`.

Runs on two processes are killed repeatedly (the launcher, one rank, or everything), restarted by the same
command, and have to end bit-identical to a run that was never killed."""

import argparse
import contextlib
import os
import random
import sys
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[1])]

import conftest  # noqa: E402
from compare import same_bits, without_timing  # noqa: E402
from conftest import TORCHRUN, flags  # noqa: E402
from forks import Fork  # noqa: E402

from ft.checkpoint import FILES, checkpoints_in  # noqa: E402
from ft.durable import find_damage  # noqa: E402
from ft.launch import kill_launch  # noqa: E402

KILLS_A_RUN = 10
WATCHDOG = 180  # seconds


def config(model, data, folder):
    """280 updates with a checkpoint every 5th and 20 evaluations."""
    return flags(
        model_name_or_path=model, dataset_name=data, output_dir=folder, learning_rate=1e-3,
        num_train_epochs=40, logging_steps=1, save_strategy="steps", save_steps=5,
        eval_strategy="steps", eval_steps=14,
    )  # fmt: skip


def fork(words):
    """The run on two processes, forks of one that has imported everything; resumes if it was killed."""
    return Fork("train.py", [*words, "--resume_from_checkpoint", "latest"], processes=2)


def start(words):
    """The same by a real launcher."""
    return conftest.start([*TORCHRUN, "2"], [*words, "--resume_from_checkpoint", "latest"])


def rows(folder):
    """Lines of the run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest(folder):
    """The newest intact checkpoint of a run, None if there is none."""
    whole = [p for p in checkpoints_in(folder / "checkpoints") if not find_damage(p, *FILES)]
    return whole[-1] if whole else None


def check_start(checkpoint, out):
    """A start has to resume from the newest checkpoint, and to start from scratch only if there is none.
    Returns whether it resumed; one that was killed before it could say so did not."""
    if checkpoint is None:
        assert "resumed from" not in out, out
        return False
    assert "starts anew" not in out, out
    assert "resumed from" not in out or f"resumed from {checkpoint} after" in out, out
    return "resumed from" in out


def kill_at_random(process, folder, generator):
    """Kill at a random moment: sometimes during setup, mostly while it trains. Returns what was killed, None
    if it ended before, and its output."""
    before, begin = rows(folder), time.monotonic()
    if generator.random() < 0.2:
        time.sleep(generator.uniform(0.2, 6))
    else:
        while process.poll() is None and rows(folder) <= before and time.monotonic() - begin < WATCHDOG:
            before = min(before, rows(folder))  # a resumed run truncates the file first
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 1.5))
    if process.poll() is not None:
        return None, said(process)
    what = generator.choice(["launcher", "rank", "both"])
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(process.pid).children()
        if what == "rank" and ranks:
            generator.choice(ranks).kill()
        elif what == "launcher":
            process.kill()
        else:
            what = "both"
            kill_launch(process)
    return what, said(process)


def said(process):
    """Wait for the end of a run; returns its output."""
    return "".join(filter(None, process.communicate(timeout=WATCHDOG)))


def finish(start, words):
    """Run to the end without a kill; returns its output."""
    process = start(words)
    out = said(process)
    assert process.returncode == 0, out
    return out


def one_run(start, model, data, folder, whole, kills, generator):
    """A run that is killed `kills` times; returns what was killed, in turn. Raises if it ends differently."""
    killed, resumed = [], 0
    while len(killed) < kills:
        before = newest(folder)
        what, out = kill_at_random(start(config(model, data, folder)), folder, generator)
        resumed += check_start(before, out)
        if what is None:
            break
        killed.append(f"{what} at {rows(folder)}")
    before = newest(folder)
    went_on = check_start(before, finish(start, config(model, data, folder)))
    assert went_on or before is None, killed
    killed[-1:] = [f"{word}; {resumed + went_on} starts went on" for word in killed[-1:]]
    assert without_timing(folder) == without_timing(whole), killed
    assert same_bits(folder / "final", whole / "final"), killed
    assert same_bits(folder / "best", whole / "best"), killed
    return killed


def kill_often(start, model, data, folder, kills, seed=0):
    """Runs with ten kills each until there were `kills`; returns them."""
    generator = random.Random(seed)
    finish(start, config(model, data, folder / "whole"))
    done = []
    while len(done) < kills:
        place = folder / f"run{len(done)}"
        left = min(KILLS_A_RUN, kills - len(done))
        done += one_run(start, model, data, place, folder / "whole", left, generator)
        print(f"{len(done)} of {kills} kills: bit-identical ({', '.join(done[-KILLS_A_RUN:])})", flush=True)
    return done


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["HF_HOME"] = str(place / "hf-home")
        model = conftest.make_tiny_model(place / "model")
        data = conftest.make_reviews(place / "reviews")
        kill_often(start, model, data, place, options.kills, options.seed)
    print(f"{options.kills} of {options.kills} random SIGKILLs ended bit-identical")
