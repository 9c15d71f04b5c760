"""Runs that kill themselves at a given moment: each is a fork of a process that has made a run before, and
imported all that a run does, and so takes a fraction of a launch's time. `Nursery` is the caller's side."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent


class Nursery:
    """Starts the process that forks; `run` is one run in a fork of it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, config, moment="never", environment=None):
        """Run `train_here(**config)`, which kills itself at a moment; returns the exit code, and what it
        said."""
        said = Path(config["output_dir"]).with_suffix(".said")
        request = {
            "config": {key: str(value) for key, value in config.items()}, "moment": moment,
            "environment": environment or {}, "said": str(said),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), said.read_text()

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def kill() -> None:
    """End this process as the kernel does when memory has run out."""
    os.kill(os.getpid(), signal.SIGKILL)


def one_file_removed(place):
    """Remove a file of a folder, as a removal that is cut short has done."""
    next(iter(sorted(Path(place).iterdir()))).unlink()
    return True


def moments():
    """Where a run may be killed: the function, and, of its calls and their arguments, before which. The run
    has 7 updates an epoch, checkpoints after 4, 8 and 12, evaluations of 8 batches after 5, 10 and 12."""
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
    """Let the process be killed before a call of a function of `owner`."""
    function, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(1)
        if condition(len(calls), *args, **options):
            kill()
        return function(*args, **options)

    setattr(owner, name, call)


def _run(request) -> int:
    from conftest import train_here
    from test_kills import at_step

    os.environ |= request["environment"]
    moment, _, number = request["moment"].partition(" #")
    if number:
        at_step(int(number), kill, step=int(moment))
    elif moment != "never":
        kill_before(*moments()[moment])
    return train_here(**request["config"])


def main() -> None:
    """Make a run for each request, a line of JSON: the first one here, each later one in a fork. Answers with
    the exit code."""
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
    answers, first = os.fdopen(os.dup(1), "w"), True
    for line in sys.stdin:
        request = json.loads(line)
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for output in (1, 2):
            os.dup2(said, output)
        os.close(said)
        child = 0 if first else os.fork()
        if child == 0:
            code = 1
            try:
                code = _run(request)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            if not first:
                os._exit(code)
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        first = False
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    main()
