"""A run that kills itself at a given moment, as a script: `killed_run.py REQUEST`, a JSON object with the
options of the run, the moment and the environment."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from ft import durable


def kill() -> None:
    """End this process as the kernel does when memory has run out."""
    os.kill(os.getpid(), signal.SIGKILL)


def one_file_removed(place):
    """Remove one file of a folder, as an interrupted removal leaves it."""
    next(iter(sorted(Path(place).iterdir()))).unlink()
    return True


def moments():
    """Where a run may be killed: a function, and a condition on its calls and their arguments. The run has 7
    updates per epoch, checkpoints after 4, 8 and 12, evaluations of 8 batches after 5, 10 and 12."""
    from ft import finish, model
    from ft.tasks.text_classification import TextClassification as Task

    return {
        "in the first update": (Task, "loss", lambda call, *_: call == 1),
        "in the middle of an epoch": (Task, "loss", lambda call, *_: call == 6),
        "in the update after a checkpoint": (Task, "loss", lambda call, *_: call == 9),
        "in the first batch of an evaluation": (Task, "predict", lambda call, *_: call == 1),
        "in the middle of an evaluation": (Task, "predict", lambda call, *_: call == 12),
        "in the last evaluation": (Task, "predict", lambda call, *_: call == 20),
        "while best/ is written": (model, "replace_folder", lambda _, new, place, *r: place.name == "best"),
        "while an old checkpoint is removed": (
            shutil, "rmtree",
            lambda _, place, **rest: Path(place).name == ".step-00000004.old" and Path(place).exists()
            and one_file_removed(place),
        ),
        "while final/ is written": (model, "replace_folder", lambda _, new, place, *r: place.name == "final"),
        "while the test rows are scored": (Task, "predict", lambda call, *_: call == 26),
        "while results.json is written": (
            finish, "write_whole", lambda _, path, text: path.name == "results.json",
        ),
    }  # fmt: skip


def kill_before(owner, name, condition):
    """Have the process killed before a call of a function of `owner`."""
    function, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(1)
        if condition(len(calls), *args, **options):
            kill()
        return function(*args, **options)

    setattr(owner, name, call)


# The steps of write_checkpoint at which something can happen, by their functions.
STEPS = ["mkdir", "save_file", "torch.save", "write_flushed", "digest", "flush", "rename"]
NUMBERS = range(19)


def at_step(number, fault, setattr=setattr, step=8):
    """Make `fault` happen just before a step of writing the checkpoint of update `step`. Returns the steps as
    they occur."""
    import safetensors.torch
    import torch

    seen, done = [], []

    def counted(name, function, place_of=lambda args: args[0]):
        def call(*args, **options):
            place = str(place_of(args))
            if not done and (f"step-{step:08d}" in place or (seen and "latest" in place)):
                seen.append(name)
                if len(seen) == number + 1:
                    fault()
                if name == "rename" and "latest" in place:
                    done.append(True)
            return function(*args, **options)

        return call

    second = lambda args: args[1]  # noqa: E731
    setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    setattr(Path, "rename", counted("rename", Path.rename))
    setattr(safetensors.torch, "save_file", counted("save_file", safetensors.torch.save_file, second))
    setattr(torch, "save", counted("torch.save", torch.save, second))
    for name in ("write_flushed", "digest", "flush"):
        setattr(durable, name, counted(name, getattr(durable, name)))
    return seen


def main(request) -> int:
    """One run; returns the exit code. The fork decides whether it draws its page."""
    from conftest import train_here

    os.environ |= request["environment"]
    moment, _, number = request["moment"].partition(" #")
    if number:
        at_step(int(number), kill, step=int(moment))
    elif moment != "never":
        kill_before(*moments()[moment])
    return train_here(**request["config"], drawn=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
