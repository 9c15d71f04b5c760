"""SIGKILL at any moment, and at each step of a checkpoint's writing: nothing is lost."""

import shutil
import signal
from pathlib import Path

import pytest
from compare import same_bits, without_timing
from conftest import ONE, ROOT, flags, launch, train_here
from random_kills import kill_often

from ft import checkpoint


@pytest.mark.timeout(1500)
@pytest.mark.case(
    "20 SIGKILLs at random moments to the launcher, a rank or all of a run on two processes",
    "every run ends bit-identical",
)
def test_twenty_random_kills_on_two_processes_end_bit_identical(tiny_model, reviews, tmp_path):
    assert len(kill_often(tiny_model, reviews, tmp_path, kills=20)) == 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """A run of 12 updates with a checkpoint every 4th, of which two are kept."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(**words(tiny_model, reviews, folder)) == 0
    return folder


def words(model, data, folder):
    return {
        "model_name_or_path": model, "dataset_name": data, "output_dir": folder, "learning_rate": 1e-3,
        "max_train_steps": 12, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5,
        "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2,
    }  # fmt: skip


# The steps of write_checkpoint at which something can happen, by the function that does them.
STEPS = ["mkdir", "save_file", "torch.save", "write_flushed", "_digest", "flush", "rename"]
KILL_IN_SAVE = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/faults"]
sys.argv[0] = {root!r} + "/train.py"
from test_kills import at_step
import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script
at_step({number}, lambda: os.kill(os.getpid(), 9))
run_script(train.train, parse(Config))
"""
NUMBERS = range(19)


def at_step(number, fault, setattr=setattr):
    """Let `fault` happen just before the given step of the writing of step-00000008. Returns the steps as
    they come."""
    import safetensors.torch
    import torch

    seen, done = [], []

    def counted(name, function, place_of=lambda args: args[0]):
        def call(*args, **options):
            place = str(place_of(args))
            if not done and ("step-00000008" in place or (seen and "latest" in place)):
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
    for name in ("write_flushed", "_digest", "flush"):
        setattr(checkpoint, name, counted(name, getattr(checkpoint, name)))
    return seen


@pytest.mark.case(
    "nothing, but every step of a checkpoint's writing is listed",
    "19 steps, of every kind that the two rows below break",
)
def test_the_steps_are_those_of_a_whole_save(tiny_model, reviews, tmp_path, monkeypatch):
    seen = at_step(-1, None, monkeypatch.setattr)
    assert train_here(**{**words(tiny_model, reviews, tmp_path / "run"), "max_train_steps": 8}) == 0
    first = seen.index("rename")
    assert set(STEPS) <= set(seen) and first > 8
    assert "write_flushed" in seen[first:] and "rename" in seen[first + 1 :]  # the pointer
    assert len(seen) == len(NUMBERS)


@pytest.mark.parametrize("number", [0, 1, 2, 4, 7, 10, 13, 15, 16, 17, 18])
@pytest.mark.case(
    "SIGKILL at a step of a checkpoint's writing, between rename and pointer, too",
    "every checkpoint is whole or absent; resumed, the end is bit-identical",
)
def test_killed_at_a_step_of_a_save_the_run_ends_bit_identical(tiny_model, reviews, tmp_path, whole, number):
    script = tmp_path / "killed.py"
    script.write_text(KILL_IN_SAVE.format(root=str(ROOT), number=number))
    config = words(tiny_model, reviews, tmp_path / "run")
    done = launch(ONE, flags(**config), script=str(script))
    assert done.returncode == -signal.SIGKILL, done.stderr
    for place in (tmp_path / "run/checkpoints").glob("step-*"):
        assert checkpoint.find_damage(place) == ""  # whole or absent
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", tmp_path / "run/final")
    assert without_timing(whole) == without_timing(tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == sorted(path.name for path in (whole / "checkpoints").iterdir())


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.case(
    "an I/O error at each step of a checkpoint's writing (write, hash, fsync, rename)",
    "a warning; the run goes on, earlier checkpoints stand, nothing half-written is left",
)
def test_a_step_of_a_save_that_fails_costs_at_most_that_checkpoint(
    tiny_model, reviews, tmp_path, whole, monkeypatch, capfd, number
):
    def fail():
        raise OSError(5, "Input/output error")

    seen = at_step(number, fail, monkeypatch.setattr)
    assert train_here(**words(tiny_model, reviews, tmp_path / "run")) == 0
    monkeypatch.undo()
    assert len(seen) > number
    assert "cannot be written" in capfd.readouterr().err
    assert same_bits(whole / "final", tmp_path / "run/final")
    places = list((tmp_path / "run/checkpoints").glob("step-*"))
    assert places and all(checkpoint.find_damage(place) == "" for place in places)
    assert not list((tmp_path / "run/checkpoints").glob(".step-*"))
    shutil.rmtree(tmp_path / "run")
