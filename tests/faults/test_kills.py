"""SIGKILL at any moment, and at each step of writing a checkpoint: nothing is lost."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from compare import results_in, same_bits, without_timing
from conftest import FORK, launch, train_here
from killed_run import NUMBERS, STEPS, at_step, moments
from random_kills import fork, kill_often

from ft import checkpoint, durable


@pytest.mark.timeout(1500)
@pytest.mark.case(
    "20 SIGKILLs at random moments to the launcher, a rank or all of a run on two processes",
    "every run ends bit-identical",
)
def test_twenty_random_kills_on_two_processes_end_bit_identical(tiny_model, reviews, tmp_path):
    assert len(kill_often(fork, tiny_model, reviews, tmp_path, kills=20)) == 20


def run(config, moment="never", drawn=False, **environment):
    """A run that kills itself at a given moment; returns the exit code and its output."""
    words = {key: str(value) for key, value in config.items()}
    request = json.dumps({"config": words, "moment": moment, "environment": environment})
    done = launch(FORK, [request], script="tests/faults/killed_run.py", drawn=drawn)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """A run of 12 updates with a checkpoint every 4th, of which two are kept."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = run(words(tiny_model, reviews, folder), drawn=True)
    assert code == 0, said
    return folder


def words(model, data, folder):
    return {
        "model_name_or_path": model, "dataset_name": data, "output_dir": folder, "learning_rate": 1e-3,
        "max_train_steps": 12, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5,
        "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2, "per_device_eval_batch_size": 8,
    }  # fmt: skip


@pytest.mark.case(
    "nothing, but every step of a checkpoint's writing is listed",
    "19 steps; the rows of SIGKILL and of an I/O error at each step break every kind of them",
)
def test_the_steps_are_those_of_a_whole_save(tiny_model, reviews, tmp_path, monkeypatch):
    seen = at_step(-1, None, monkeypatch.setattr)
    assert train_here(**{**words(tiny_model, reviews, tmp_path / "run"), "max_train_steps": 8}) == 0
    first = seen.index("rename")
    assert set(STEPS) <= set(seen) and first > 8
    assert "write_flushed" in seen[first:] and "rename" in seen[first + 1 :]  # the pointer
    assert len(seen) == len(NUMBERS)


DRAWN = {"report.html", "training.png"}


def killed_and_resumed(config, whole, moment, drawn):
    """Kill a run at a moment and restart it: it has to end like the one that was never killed, except for its
    page if that is not `drawn`."""
    code, said = run(config, moment, drawn)
    assert code == -signal.SIGKILL, said
    folder = Path(config["output_dir"])
    there = checkpoint.checkpoints_in(folder / "checkpoints")
    for place in folder.glob("checkpoints/step-*"):
        assert durable.find_damage(place, *checkpoint.FILES) == ""  # whole or absent
    code, said = run({**config, "resume_from_checkpoint": "latest"}, drawn=drawn)
    assert code == 0, said
    assert (f"resumed from {there[-1]}" if there else "this run starts anew") in said
    for name in ("final", "best"):
        assert same_bits(whole / name, folder / name)
    assert without_timing(whole) == without_timing(folder)
    assert results_in(whole) == results_in(folder)
    left = [sorted(path.name for path in (place / "checkpoints").iterdir()) for place in (whole, folder)]
    assert left[0] == left[1]
    expected = {path.name for path in whole.iterdir()}
    assert expected > DRAWN
    assert {path.name for path in folder.iterdir()} == (expected if drawn else expected - DRAWN)


# All steps of a checkpoint within the run; a few of the last update's.
@pytest.mark.parametrize(
    ("step", "number"), [*((8, n) for n in NUMBERS), (12, 0), (12, 9), (12, 16), (12, 18)]
)
@pytest.mark.case(
    "SIGKILL at each step of a checkpoint's writing, also between rename and pointer, or of the last update",
    "every checkpoint is whole or absent; resumed, the end is bit-identical",
)
def test_killed_at_a_step_of_a_save_the_run_ends_bit_identical(
    tiny_model, reviews, tmp_path, whole, step, number
):
    config = words(tiny_model, reviews, tmp_path / "run")
    killed_and_resumed(config, whole, f"{step} #{number}", drawn=False)  # long before the page


@pytest.mark.parametrize("moment", moments())
@pytest.mark.case(
    "SIGKILL in an update, in an evaluation, while best/ or final/ is written, an old checkpoint is removed, "
    "the test rows are scored",
    "resumed, the end is bit-identical, results.json, too",
)
def test_killed_at_any_moment_the_run_ends_bit_identical(tiny_model, reviews, tmp_path, whole, moment):
    killed_and_resumed(words(tiny_model, reviews, tmp_path / "run"), whole, moment, drawn=True)


@pytest.mark.case(
    "SIGKILL to a run with W&B (offline)",
    "resumed, it goes on under the same id",
)
def test_the_run_of_wandb_keeps_its_id(tiny_model, reviews, tmp_path, whole):
    pytest.importorskip("wandb")
    config = {**words(tiny_model, reviews, tmp_path / "run"), "report_to": "wandb"}
    offline = {"WANDB_MODE": "offline"}
    code, said = run(config, "in the update after a checkpoint", **offline)
    assert code == -signal.SIGKILL, said
    name, resumes = (tmp_path / "run/wandb_id").read_text().split()
    code, said = run({**config, "resume_from_checkpoint": "latest"}, **offline)
    assert code == 0 and resumes == "0", said
    assert (tmp_path / "run/wandb_id").read_text().split() == [name, "1"]
    folders = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{name}") for folder in folders)
    assert same_bits(whole / "final", tmp_path / "run/final")
    assert without_timing(whole) == without_timing(tmp_path / "run")


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
    assert places and all(durable.find_damage(place) == "" for place in places)
    assert not list((tmp_path / "run/checkpoints").glob(".step-*"))
    shutil.rmtree(tmp_path / "run")
