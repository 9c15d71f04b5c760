"""metrics.jsonl is strict JSON, complete, and cut to the checkpoint on resume; report_to works as said."""

import json
import math
import re
import threading
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from ft import tracking, wandb_run
from ft.config import Config
from ft.errors import UserError
from ft.tracking import Tracker, choose_trackers, to_json
from ft.values import is_installed, scalars


def open_tracker(folder, start_step=0, main=True, make_room=lambda: None):
    accelerator = SimpleNamespace(is_main_process=main, log_with=[], trackers=[])
    return Tracker(accelerator, Config(), folder, start_step, rows=start_step, make_room=make_room)


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_an_upload_is_waited_for_until_it_is_done_or_the_run_is_asked_to_stop(monkeypatch):
    done, asked = threading.Event(), [None] * 3

    def upload(seconds, error=None):
        def wait(timeout=None):
            assert timeout is None, "wandb cancels an upload that takes longer"
            done.wait(seconds)
            done.set()
            if error:
                raise error

        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(wandb_run, "noted_signal", lambda: asked.pop() if asked else "SIGTERM")
    wandb_run.wait_for_upload(upload(60))
    assert not done.is_set() and not asked  # it was left to itself
    done.set()
    monkeypatch.setattr(wandb_run, "noted_signal", lambda: None)
    done = threading.Event()
    wandb_run.wait_for_upload(upload(0.5))
    assert done.is_set()
    with pytest.raises(ValueError, match="full"):
        wandb_run.wait_for_upload(upload(0, ValueError("full")))


def test_a_row_that_the_disk_takes_in_part_is_whole_once_there_is_room(tmp_path):
    """A checkpoint that is being written may fill the disk for a moment."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    tracker = open_tracker(tmp_path, make_room=free)
    tracker.log(1, 0.5, {"train/loss": 1.0})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines(tmp_path)[0]) + 20, hard))
        tracker.log(2, 1.0, {"train/loss": 0.5})
        assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2]
        tracker._make_room = lambda: None
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(UserError, match=r"metrics\.jsonl' cannot be written"):
            tracker.log(3, 1.5, {"train/loss": 0.2})
    finally:
        free()


def strictly(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- rows


def test_a_row_holds_step_epoch_and_the_numbers_and_stands_in_the_file_at_once(tmp_path):
    tracker = open_tracker(tmp_path)
    tracker.log(
        3, 0.123456, {"train/loss": 1.5, "eval/auroc": None, "eval/confusion_matrix": [[1, 0], [0, 1]]}
    )
    assert [strictly(line) for line in lines(tmp_path)] == [
        {"step": 3, "epoch": 0.1235, "train/loss": 1.5, "eval/auroc": None}
    ]
    tracker.finish({})


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path):
    tracker = open_tracker(tmp_path)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    tracker.log(1, 1.0, values)
    row = strictly(lines(tmp_path)[0])
    assert row == {"step": 1, "epoch": 1.0, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert math.isnan(float(row["a"])) and [float(row["b"]), float(row["c"])] == [math.inf, -math.inf]


def test_to_json_reaches_into_lists_and_objects():
    nested = {"scores": [1.0, math.nan, {"deep": (math.inf, 2)}], "name": "x", "none": None}
    assert strictly(to_json(nested)) == {
        "scores": [1.0, "NaN", {"deep": ["Infinity", 2]}], "name": "x", "none": None,
    }  # fmt: skip
    assert to_json({"a": 1}, indent=1) == json.dumps({"a": 1}, indent=1)


def test_tables_stay_behind():
    assert scalars({"a": 1, "b": 2.5, "c": None, "d": [1], "e": {"f": 1}}) == {"a": 1, "b": 2.5, "c": None}


def test_only_the_main_process_writes(tmp_path):
    tracker = open_tracker(tmp_path, main=False)
    tracker.log(1, 1.0, {"train/loss": 1.0})
    tracker.finish({})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_in_one_message(tmp_path, monkeypatch):
    tracker = open_tracker(tmp_path)

    def full(text):
        raise OSError(28, "No space left on device")

    tracker._file = SimpleNamespace(write=full)
    with pytest.raises(UserError, match=r"metrics\.jsonl.*No space left"):
        tracker.log(1, 1.0, {})


# --- resuming


def test_resuming_keeps_the_rows_up_to_the_checkpoint_and_drops_a_torn_line(tmp_path):
    whole = [{"step": step, "epoch": step / 4, "train/loss": 1.0} for step in (1, 2, 3, 4)]
    rows = "".join(json.dumps(row) + "\n" for row in whole)
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 5, "ep')
    tracker = open_tracker(tmp_path, start_step=3)
    tracker.log(4, 1.0, {"train/loss": 0.5})
    tracker.finish({})
    kept = [strictly(line) for line in lines(tmp_path)]
    assert kept == [*whole[:3], {"step": 4, "epoch": 1.0, "train/loss": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0}\n')
    open_tracker(tmp_path).finish({})
    assert lines(tmp_path) == []


def test_a_crash_while_the_file_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0}\n')
    monkeypatch.setattr(tracking.os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_tracker(tmp_path, start_step=1)
    assert lines(tmp_path) == ['{"step": 1, "epoch": 1.0}']


def test_the_wandb_id_is_made_once_and_resumes_are_counted(tmp_path):
    run_id, resumes = wandb_run._wandb_id(tmp_path, None)
    assert re.fullmatch("[0-9a-f]{8}", run_id) and resumes == 0
    assert wandb_run._wandb_id(tmp_path, None) == (run_id, 1)
    assert wandb_run._wandb_id(tmp_path, None) == (run_id, 2)
    assert wandb_run._wandb_id(tmp_path, "mine") == ("mine", 0)  # WANDB_RUN_ID
    assert wandb_run._wandb_id(tmp_path, "mine") == ("mine", 1)


# --- W&B


class WandbRun:
    """What a tracker needs of W&B's run."""

    name, config, offline = "wandb", {"resumes": 1}, True

    def __init__(self):
        self.tracker, self.summary, self.rows, self.defined, self.alerts = self, {}, [], {}, []

    def define_metric(self, name, step_metric, summary):
        self.defined[name] = (step_metric, summary)

    def log(self, values):
        self.rows.append(values)

    def alert(self, title, text, level):
        self.alerts.append((title, text, level))

    def finish(self):
        pass


@pytest.fixture
def wandb_alone(monkeypatch):
    """W&B as far as the end of a run needs it."""
    monkeypatch.setitem(tracking.sys.modules, "wandb", SimpleNamespace(teardown=lambda: None))
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "300")


@pytest.mark.usefixtures("wandb_alone")
def test_the_best_values_are_those_of_the_whole_run_before_a_resume_too(tmp_path, capsys):
    before = [
        {"step": 1, "epoch": 0.5, "eval/rows": 9, "eval/accuracy": 0.9, "eval/loss": 0.2, "eval/auroc": None},
        {"step": 1, "epoch": 0.5, "train/loss": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    tracker, run = open_tracker(tmp_path, start_step=2), WandbRun()
    tracker.accelerator.trackers.append(run)
    values = {"eval/rows": 9, "eval/accuracy": 0.7, "eval/loss": math.nan, "eval/auroc": 0.5}
    tracker.log(2, 1.0, values)
    tracker.finish(
        {**values, "eval/accuracy_low": 0.6, "train/total_steps": 2, "best/accuracy": 0.9, "t": [1]}
    )
    assert run.summary == {
        "eval/accuracy": {"max": 0.9, "last": 0.7}, "eval/loss": {"min": 0.2, "last": 0.2},
        "eval/auroc": {"max": 0.5, "last": 0.5}, "eval/rows": 9, "eval/accuracy_low": 0.6,
        "train/total_steps": 2, "best/accuracy": 0.9,
    }  # fmt: skip
    assert run.defined == {
        "eval/accuracy": ("step", "max,last"), "eval/loss": ("step", "min,last"),
        "eval/auroc": ("step", "max,last"),
    }  # fmt: skip
    assert run.rows[-1] == {"step": 2, "resumes": 1, "best/accuracy": 0.9}
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("wandb_alone")
def test_charts_have_a_time_of_their_own(tmp_path, monkeypatch, capsys):
    """Making them is no answer that a tracker owes."""
    tracker, run = open_tracker(tmp_path), WandbRun()
    tracker.accelerator.trackers.append(run)
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.5)

    def slow():
        time.sleep(1)
        return {}

    tracker.finish({"train/total_steps": 2}, slow)
    assert capsys.readouterr().err == "" and run.rows == [{"step": 2, "resumes": 1}]


def test_a_metric_with_a_point_in_its_name_is_none_of_a_tree():
    run = WandbRun()
    wandb_run.define_best(run, "eval/f1_micro_at_0.5", True)
    assert run.defined == {r"eval/f1_micro_at_0\.5": ("step", "max,last")}


def test_an_alert_goes_to_wandb_alone_and_one_that_fails_costs_a_warning(tmp_path, capsys):
    tracker, run = open_tracker(tmp_path), WandbRun()
    tracker.alert("nobody", "listens")
    tracker.accelerator.trackers += [SimpleNamespace(name="tensorboard"), run]
    tracker.alert("A title", "some text")
    assert run.alerts == [("A title", "some text", "ERROR")]
    run.alert = None
    tracker.alert("A title", "some text")
    assert [one.name for one in tracker.accelerator.trackers] == ["tensorboard"]
    assert "warning: wandb failed" in capsys.readouterr().err


@pytest.mark.parametrize("report_to", ["none", "tensorboard,trackio"])
def test_artifacts_without_wandb_are_refused(report_to):
    needed = {"model_name_or_path": "m", "train_file": "f"}
    with pytest.raises(UserError, match=r"log_artifacts: found model, but report_to is"):
        Config(**needed, log_artifacts="model", report_to=report_to).check()
    for trackers in ("wandb", ["tensorboard", "wandb"], "all"):
        Config(**needed, log_artifacts="model", report_to=trackers).check()


# --- report_to


@pytest.fixture
def installed(monkeypatch):
    there = {"wandb", "tensorboard"}
    monkeypatch.setattr(tracking, "is_installed", lambda name: name in there)


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    """W&B's folder is in the clone, the first place to import from."""
    (tmp_path / "wandbs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("wandbs") and not is_installed("nosuchmodule") and is_installed("json")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["none"], []),
        (["wandb"], ["wandb"]),
        (["tensorboard", "wandb", "tensorboard"], ["tensorboard", "wandb"]),
        (["all"], ["wandb", "tensorboard"]),
        (["wandb", "all"], ["wandb", "tensorboard"]),
    ],
)
def test_all_are_the_installed_ones_and_none_is_no_one(installed, names, expected):
    assert choose_trackers(names) == expected


def test_an_unknown_tracker_is_named_beside_the_known_ones(installed):
    with pytest.raises(UserError, match=r"report_to: found 'wandbb', expected wandb, tensorboard, trackio"):
        choose_trackers(["wandbb"])


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(installed):
    with pytest.raises(UserError, match=r"trackio is not installed; pip install '\.\[trackio\]'"):
        choose_trackers(["trackio"])


def test_the_config_holds_no_secret_by_its_names():
    """It goes unchanged to config.yaml, W&B and the model card."""
    secret = re.compile("(^|_)(api_?key|token|secret|password|auth)(_|$)")
    assert not [field.name for field in fields(Config) if secret.search(field.name)]


def test_every_tracker_that_can_be_chosen_can_be_started():
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in tracking.STARTS:
        assert re.search(rf"^{name} = \[", extras, re.MULTILINE), f"no extra {name} in pyproject.toml"


def test_a_crash_while_wandbs_id_is_written_loses_it_not(tmp_path, monkeypatch):
    run_id, resumes = wandb_run._wandb_id(tmp_path, None)
    assert resumes == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        wandb_run._wandb_id(tmp_path, None)
    assert (tmp_path / "wandb_id").read_text() == f"{run_id} 0\n"
    assert wandb_run._wandb_id(tmp_path, None) == (run_id, 1)


def test_a_server_whose_certificate_python_does_not_trust_is_left_to_wandb(monkeypatch):
    import ssl
    import urllib.error
    import urllib.request
    from unittest.mock import Mock

    import wandb

    from ft.wandb_run import _why_offline

    settings = wandb.Settings(base_url="https://wandb.example")
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    for error, said in ((ssl.SSLError("self-signed"), ""), (OSError("no route"), "cannot be reached")):
        monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=urllib.error.URLError(error)))
        assert _why_offline(settings).endswith(said) and bool(_why_offline(settings)) == bool(said)
