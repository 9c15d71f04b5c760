"""Trackers get all numbers of metrics.jsonl, in one run with one id, and never harm the training."""

import csv
import hashlib
import json
import math
import os
import pty
import select
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import FORK, FORKS, ONE, ROOT, flags, launch, metrics_of, train_here
from stand_in import StandIn

from ft.errors import UserError

KEY = "0123456789abcdef0123456789abcdef01234567"


def records_of(content):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; a record may be split into first,
    middle and last pieces) after a 7-byte header."""
    whole, position = b"", 7
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", content, position + 4) if left >= 7 else (0, 0)
        if kind == 0:
            position += left
            continue
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


class WandbFile:
    """What one start of a run wrote: id, project, name and tags, config, history rows, summary."""

    def __init__(self, path):
        from wandb.proto import wandb_internal_pb2

        self.folder = path.parent
        self.history, self.config, self.summary, self.kinds = [], {}, {}, []
        self.alerts, self.artifacts = [], {}
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            self.kinds.append(kind)
            if kind == "run":
                self.run = record.run
                self.config |= self._items(record.run.config.update)
            elif kind == "config":
                self.config |= self._items(record.config.update)
            elif kind == "history":
                self.history.append(self._items(record.history.item))
            elif kind == "summary":
                self.summary |= self._items(record.summary.update)
            elif kind == "metric":
                self.metrics = {**getattr(self, "metrics", {}), self._name(record.metric): record.metric}
            elif kind == "alert":
                self.alerts.append((record.alert.title, record.alert.level, record.alert.text))
            elif kind == "artifact":
                self.artifacts[record.artifact.type] = record.artifact
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @staticmethod
    def _items(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    @staticmethod
    def _name(metric):
        return metric.name or metric.glob_name

    def rows(self):
        """History without what W&B adds (_step, _timestamp, _runtime), without our count of resumes, and
        without the row of charts, which has no epoch."""
        return [
            {key: value for key, value in row.items() if not key.startswith("_") and key != "resumes"}
            for row in self.history
            if "epoch" in row
        ]

    def numbers(self):
        """The summary, with the last value of a metric that has a best one, too."""
        return {
            key: value["last"] if isinstance(value, dict) and "last" in value else value
            for key, value in self.summary.items()
        }

    def tables(self):
        """The tables of the last row, by their keys; that of a plot ends in _table."""
        paths = {key[:-5]: value for key, value in self.history[-1].items() if key.endswith("/path")}
        return {key: json.loads((self.folder / "files" / path).read_text()) for key, path in paths.items()}


def wandb_files(folder):
    """The offline starts below a folder, in chronological order."""
    return [WandbFile(path) for path in sorted(folder.glob("**/offline-run-*/run-*.wandb"))]


def expected_rows(output_dir):
    """What a tracker gets: metrics.jsonl without undefined metrics."""
    return [{k: v for k, v in row.items() if v is not None} for row in metrics_of(output_dir)]


def results_of(output_dir):
    results = json.loads((output_dir / "results.json").read_text())
    return {key: value for key, value in results.items() if isinstance(value, int | float)}


@pytest.fixture
def wandb_here(monkeypatch, tmp_path):
    """No key is found in the home of whoever runs the tests, or runs would go to that account. W&B reads the
    environment once per process; forget it before and after. A run that its service left unfinished still
    captures output: each line would be an error that W&B logs, whose traceback pytest keeps, and with it the
    run that printed it."""
    import wandb
    from wandb.sdk.lib import console_capture

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    ours = "ERROR_REPORTING INIT_TIMEOUT FINISH_TIMEOUT FINISH_TIMEOUT_RAISES SHOW_INFO RUN_GROUP"
    for name in [*ours.split(), "DATA_DIR", "CACHE_DIR"]:
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that what the run sets is undone, too
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield
    wandb.teardown()
    console_capture._stdout_callbacks.clear()
    console_capture._stderr_callbacks.clear()


class Server(StandIn):
    """A local server that notes every connection and answers each request with one status, or not at all."""

    protocol = "HTTP/1.0"

    def __init__(self, status):
        self.status, self.released = status, threading.Event()
        super().__init__()

    def respond(self, method, path, headers, body):
        if self.status is None:
            self.released.wait(60)
        return self.status or 200, {}, b"{}"

    def close(self):
        self.released.set()
        super().close()


@pytest.fixture
def serve():
    servers = []
    yield lambda status: servers.append(Server(status)) or servers[-1]
    for server in servers:
        server.close()


# --- W&B, offline


def test_several_seeds_are_runs_of_one_group(base_flags, tmp_path, wandb_here):
    base_flags |= {"num_seeds": 2, "seed": 5, "report_to": "wandb", "output_dir": tmp_path / "reviews"}
    assert train_here(**base_flags) == 0
    files = wandb_files(tmp_path / "reviews")
    assert [(file.run.run_group, file.run.display_name) for file in files] == [
        ("reviews", "reviews-seed-5"), ("reviews", "reviews-seed-6"),
    ]  # fmt: skip
    assert len({file.run.run_id for file in files}) == 2
    for file, name in zip(files, ("seed-5", "seed-6"), strict=True):
        assert file.rows() == expected_rows(tmp_path / "reviews" / name)
        assert file.config["seed"] == int(name[5:]) and file.exit_code == 0
        assert os.listdir(tmp_path / "reviews" / name / "wandb/artifacts/staging")  # each has its own tables


def test_an_id_for_one_run_is_refused_for_several(base_flags, wandb_here, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abcd")
    with pytest.raises(UserError, match="num_seeds: WANDB_RUN_ID names one run of W&B"):
        train_here(**base_flags, num_seeds=2, report_to="wandb")


@pytest.mark.usefixtures("fonts")
def test_without_a_key_the_run_is_offline_and_holds_every_number(base_flags, tmp_path, serve):
    """Nothing is asked or contacted, nothing is stored elsewhere; one line says how to upload."""
    proxy, home = serve(200), tmp_path / "home"
    output = tmp_path / "run"
    before = set(os.listdir(ROOT))
    done = launch(
        ONE, flags(**base_flags, report_to="wandb", run_name="mine"), HOME=str(home),
        HTTP_PROXY=proxy.url, HTTPS_PROXY=proxy.url, NO_PROXY="",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    (folder,) = (output / "wandb").glob("offline-run-*")
    said = [line for line in done.stdout.splitlines() if "W&B" in line]
    assert len(said) == 1 and said[0].endswith(f"To upload this run: wandb sync {folder}")
    assert "no API key" in said[0]
    assert proxy.requests == []  # no network, no telemetry, no error report
    assert set(os.listdir(ROOT)) <= before | {"__pycache__", ".pytest_cache"}
    assert not list(home.glob(".netrc")) and not list(home.rglob("*wandb*"))

    (run,) = wandb_files(output)
    assert run.rows() == expected_rows(output)
    keys = {key for row in run.rows() for key in row}
    assert {"train/loss", "train/learning_rate", "eval/accuracy", "perf/tokens_per_second"} <= keys
    # No row was merged or dropped; the last one has the charts.
    assert [row["_step"] for row in run.history] == list(range(14 + 2 + 1))
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert {key: run.config[key] for key in config} == config
    results = results_of(output)
    numbers = run.numbers()
    assert len(results) > 20 and {key: numbers[key] for key in results} == results
    assert run.run.display_name == "mine" and run.run.project == "ft"
    # Our step is the axis of each series, not a series itself.
    axes = {name: metric.step_metric for name, metric in run.metrics.items()}
    assert axes["train/*"] == axes["eval/*"] == axes["perf/*"] == axes["data/*"] == axes["epoch"] == "step"
    assert axes["step"] == "" and run.metrics["step"].options.hidden
    assert run.exit_code == 0


def test_two_processes_make_one_run(base_flags, tmp_path, wandb_here):
    words = {**base_flags, "num_train_epochs": 1, "report_to": "wandb"}
    done = launch(FORKS, flags(**words))
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("**/*.wandb"))) == 1
    assert done.stdout.count("wandb sync") == 1
    (run,) = wandb_files(tmp_path / "run")
    rows = run.rows()
    assert rows == expected_rows(tmp_path / "run")
    for row in [row for row in rows if "train/loss" in row]:
        for name in ("tokens_per_second", "padding_share", "data_wait_share"):
            low, mean, high = (row[f"perf/rank_{name}_{end}"] for end in ("min", "mean", "max"))
            assert 0 <= low <= high and mean == pytest.approx((low + high) / 2)
        low, high = (row[f"perf/rank_tokens_per_second_{end}"] for end in ("min", "max"))
        assert low < high  # two processes with other rows and another clock
        assert row["perf/padding_share"] < 1 and row["data/tokens"] > row["data/rows"]
    assert rows[-1]["step"] == 7 and rows[-2]["data/rows"] == 203


def test_on_a_terminal_nothing_is_asked_either(base_flags, tmp_path):
    """On a terminal, `wandb.init` asks for a key, and waits."""
    ours, theirs = pty.openpty()
    words = flags(**{**base_flags, "num_train_epochs": 1}, report_to="wandb")
    process = subprocess.Popen(
        [*ONE, str(ROOT / "train.py"), *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path / "home")}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                try:
                    said += os.read(ours, 4096)
                except OSError:  # the other end is closed
                    break
        assert process.wait(timeout=max(1, deadline - time.monotonic())) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"wandb sync" in said and b"Enter your choice" not in said


def test_a_finished_run_shows_its_charts_its_best_values_and_what_asked_for_artifacts(
    base_flags, tmp_path, wandb_here, capfd
):
    output = tmp_path / "run"
    words = {**base_flags, "eval_strategy": "steps", "eval_steps": 3, "layerwise_lr_decay": 0.5}
    assert train_here(**words, report_to="wandb", log_artifacts="all") == 0
    assert capfd.readouterr().err == ""
    (run,) = wandb_files(output)
    rows, results = metrics_of(output), json.loads((output / "results.json").read_text())

    # A rate for each group: head and top layer share one, the layer below has half of it, and so on.
    rates = [{k: v for k, v in row.items() if k.startswith("train/learning_rate")} for row in run.rows()]
    names = ("head_and_layer_1", "layer_0", "embeddings")
    for row in filter(None, rates):
        top = row["train/learning_rate"]
        wanted = {f"train/learning_rate/{name}": top / 2**below for below, name in enumerate(names)}
        assert row == {"train/learning_rate": top} | wanted

    # The best of all evaluations, and the last.
    for name, end, best in (("accuracy", "max", max), ("loss", "min", min), ("f1_macro", "max", max)):
        values = [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row]
        assert len(values) == 5
        assert run.summary[f"eval/{name}"] == {end: best(values), "last": values[-1]}
        assert getattr(run.metrics[f"eval/{name}"].summary, end)
    last = run.history[-1]
    assert last["best/accuracy"] == run.summary["best/accuracy"] == results["best/accuracy"]
    assert last["step"] == 14

    tables, names = run.tables(), ["bad", "fine", "good"]
    for split in ("eval", "test"):
        matrix = results[f"{split}/confusion_matrix"]
        cells = {
            (true, guess): rows for true, guess, rows in tables[f"{split}/confusion_matrix_table"]["data"]
        }
        assert [[cells[true, guess] for guess in names] for true in names] == matrix
        for curve in ("pr_curve", "roc_curve"):
            assert {row[0] for row in tables[f"{split}/{curve}_table"]["data"]} == set(names)
        found = [row[1:] for row in tables[f"{split}/calibration_table"]["data"] if row[0] == "the model"]
        assert found == [[part["probability"], part["share"]] for part in results[f"{split}/reliability"]]
        table = tables[f"{split}/worst_errors"]
        errors = results[f"{split}/worst_errors"]
        assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == errors
        assert 0 < len(errors) <= 20 and errors[0]["text"]
        pictures = run.config["_wandb/visualize/" + f"{split}/roc_curve"]["panel_config"]["fieldSettings"]
        assert pictures == {"class": "class", "x": "false positive rate", "y": "true positive rate"}

    model, dataset = (run.artifacts[kind] for kind in ("model", "dataset"))
    weights = (output / "best/model.safetensors").read_bytes()
    about = json.loads(model.metadata)
    assert about["fingerprint"] == hashlib.sha256(weights).hexdigest()
    assert about["test/accuracy"] == results["test/accuracy"] and model.name == "model-run"
    assert {entry.path for entry in model.manifest.contents} == set(os.listdir(output / "best"))
    fingerprint = json.loads((output / "environment.json").read_text())["data_fingerprint"]
    about = json.loads(dataset.metadata)
    assert (
        about["fingerprint"] == fingerprint and dataset.name == f"dataset-{base_flags['dataset_name'].name}"
    )
    assert about["rows"] == {"train": 203, "validation": 61, "test": 47}
    assert about["sources"].keys() == about["rows"].keys() and len({*about["sources"].values()}) == 3
    assert [entry.path for entry in dataset.manifest.contents] == ["dataset.json"]  # nothing of the rows
    # All that W&B will upload is in the run's own folder, with no link to what a later run may change.
    for kept in run.artifacts.values():
        for entry in kept.manifest.contents:
            assert (output / "wandb").resolve() in Path(entry.local_path).parents
    assert not list((tmp_path / "home").rglob("*wandb*"))


def test_without_log_texts_no_tracker_has_a_text_of_the_data(base_flags, tmp_path, wandb_here):
    words = {
        **base_flags,
        "num_train_epochs": 1,
        "report_to": "wandb,tensorboard",
        "log_artifacts": "dataset",
    }
    assert train_here(**words, log_texts=False) == 0
    output = tmp_path / "run"
    (run,) = wandb_files(output)
    assert {
        f"{split}/{name}" for split in ("eval", "test") for name in ("roc_curve_table", "calibration_table")
    } < (run.tables().keys())
    assert not [key for key in run.tables() if "worst_errors" in key]
    texts = [row["text"] for file in base_flags["dataset_name"].glob("*.csv") for row in rows_of(file)]
    pieces = {text[:24].encode() for text in texts if len(text) > 24}
    for path in [*(output / "wandb").rglob("*"), *(output / "tensorboard").rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        assert not [piece for piece in pieces if piece in content], path


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_charts_that_fail_cost_a_warning_and_nothing_else(
    base_flags, tmp_path, wandb_here, monkeypatch, capsys
):
    import ft.finish

    monkeypatch.setattr(ft.finish, "charts", lambda *args: 1 / 0)
    words = {**base_flags, "num_train_epochs": 1, "report_to": "wandb", "log_artifacts": "dataset"}
    assert train_here(**words) == 0
    assert capsys.readouterr().err == "warning: wandb has no charts of this run (division by zero)\n"
    (run,) = wandb_files(tmp_path / "run")
    numbers, results = run.numbers(), results_of(tmp_path / "run")
    assert {key: numbers[key] for key in results} == results
    assert run.artifacts["dataset"] and run.exit_code == 0


def test_a_trial_of_the_sweep_runs_as_wandbs_agent_starts_it(tiny_model, reviews, tmp_path):
    """The agent's own functions build the command; `accelerate launch` runs it, and W&B takes the values."""
    from wandb.sdk.launch.sweeps import utils
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    sweep = utils.load_sweep_config(str(ROOT / "sweeps/finetune.yaml"))
    values = {
        name: {"value": choice["values"][-1] if "values" in choice else choice["min"]}
        for name, choice in sweep["parameters"].items()
    }
    args = utils.create_sweep_command_args({"args": values})["args"]
    command = [
        word for part in utils.create_sweep_command(sweep["command"])
        for word in (args if part == "${args}" else [part])
    ]  # fmt: skip
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    mine = {"model_name_or_path": str(tiny_model), "dataset_name": str(reviews), "max_train_steps": 2}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(mine))
    save_config_file_from_dict(str(tmp_path / "values.yaml"), values)
    environment = {
        "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "trial7", "WANDB_MODE": "offline",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "values.yaml"), "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "output/sweep/trial7"
    config = yaml.safe_load((output / "config.yaml").read_text())
    (run,) = wandb_files(output)
    assert run.run.run_id == "trial7" and run.run.sweep_id == "s1"
    for name, value in values.items():
        assert config[name] == run.config[name] == value["value"], name
    goal = sweep["metric"]["name"]
    assert sweep["metric"]["goal"] == "maximize" and run.history[-1][goal] == run.summary[goal] > 0


def test_a_resumed_run_goes_on_under_its_id_and_no_step_is_dropped(base_flags, tmp_path, wandb_here, capsys):
    """The run dies at update 10; its newest checkpoint is of update 8, so 9 and 10 come twice."""
    output = tmp_path / "run"
    words = {**base_flags, "report_to": "wandb,tensorboard", "save_strategy": "steps", "save_steps": 4}
    words |= {"eval_strategy": "steps", "eval_steps": 5}
    assert train_here(**words, max_train_steps=10) == 0
    first_rows = expected_rows(output)
    shutil.rmtree(output / "checkpoints/step-00000010")
    capsys.readouterr()
    assert train_here(**words, resume_from_checkpoint="latest") == 0

    first, second = wandb_files(output)
    assert first.run.run_id == second.run.run_id and second.run.resume
    assert capsys.readouterr().out.count(f"wandb sync {output}/wandb/offline-run-*-{first.run.run_id}") == 1
    assert first.rows() == first_rows
    rows = expected_rows(output)
    assert second.rows() == [row for row in rows if row["step"] > 8]
    assert {row["step"] for row in first.rows() + second.rows()} == set(range(1, 15))
    # History cannot be overwritten, so repeated rows are distinguishable.
    assert {row["resumes"] for row in first.history} == {0}
    assert {row["resumes"] for row in second.history} == {1} and second.config["resumes"] == 1

    # TensorBoard hides repeated rows: one value for each step.
    events = read_tensorboard(output / "tensorboard")
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 15))


def test_two_processes_that_end_with_an_error_leave_wandb_whole(base_flags, tmp_path, wandb_here):
    """Several processes leave by os._exit (ft/runtime.py), which runs none of W&B's exit handlers."""
    words = {**base_flags, "learning_rate": 1e30, "report_to": "wandb"}
    done = launch(FORKS, flags(**words))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(said) == 1 and said[0].startswith("error: 3 updates in a")  # no rank
    (run,) = wandb_files(tmp_path / "run")
    assert [row["step"] for row in run.rows()] == [row["step"] for row in metrics_of(tmp_path / "run")]
    assert run.exit_code == 2
    assert [title for title, *_ in run.alerts] == [
        "The loss or gradient is not finite", "The run ended: the loss or gradient is not finite"
    ]  # fmt: skip


def test_a_run_stopped_by_max_time_tells_wandb_that_it_will_be_resumed(base_flags, tmp_path, wandb_here):
    assert train_here(**base_flags, report_to="wandb", max_time="1s", max_train_steps=100000) == 75
    (run,) = wandb_files(tmp_path / "run")
    assert run.exit_code == 75 and "preempting" in run.kinds
    ((title, level, text),) = run.alerts
    step = metrics_of(tmp_path / "run")[-1]["step"]
    assert (title, level) == ("The run was stopped", "WARN")
    assert text.startswith(f"stopped after update {step:,} (max_time); a checkpoint is saved")


def test_the_users_settings_win(base_flags, tmp_path, wandb_here, monkeypatch, capsys):
    chosen = {
        "MODE": "offline", "PROJECT": "theirs", "NAME": "named", "ENTITY": "team", "TAGS": "a,b",
        "RUN_ID": "id-of-theirs", "DIR": str(tmp_path / "elsewhere"), "NOTES": "why",
    }  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    for key, value in chosen.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    assert train_here(**{**base_flags, "num_train_epochs": 1}, report_to="wandb") == 0
    (run,) = wandb_files(tmp_path / "elsewhere")
    assert not wandb_files(tmp_path / "run")
    run = run.run
    assert (run.project, run.display_name, run.entity, run.notes) == ("theirs", "named", "team", "why")
    assert list(run.tags) == ["a", "b"] and run.run_id == "id-of-theirs"
    assert "as WANDB_MODE asks" in capsys.readouterr().out


def test_wandb_mode_disabled_writes_and_says_nothing(base_flags, tmp_path, wandb_here, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert train_here(**base_flags, report_to="wandb") == 0
    assert not (tmp_path / "run/wandb").exists()
    captured = capsys.readouterr()
    assert "W&B" not in captured.out and "wandb" not in captured.err
    assert len(metrics_of(tmp_path / "run")) == 14 + 2


# --- W&B with a key, but no server that takes the run


@pytest.mark.parametrize(
    ("server", "mode"), [("refuses", ""), ("does not answer", ""), ("is not there", "online")]
)
@pytest.mark.case(
    "W&B's server refuses, does not answer, or is not there",
    "the run goes on offline and says so; the key is in no file",
)
def test_with_a_key_and_no_server_the_run_is_offline_and_the_key_is_in_no_file(
    base_flags, tmp_path, wandb_here, monkeypatch, capsys, serve, request, server, mode
):
    if server == "is not there":
        free = (
            socket.socket()
        )  # which does not listen; while it is bound, no other test's server can use its port
        request.addfinalizer(free.close)
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    else:
        url = serve({"refuses": 401, "does not answer": None}[server]).url
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    begin = time.monotonic()
    assert train_here(**{**base_flags, "num_train_epochs": 1}, report_to="wandb") == 0
    assert time.monotonic() - begin < 60
    said = [line for line in capsys.readouterr().out.splitlines() if "W&B: offline" in line]
    assert len(said) == 1 and "wandb sync" in said[0]
    assert ("its server did not take the run" if server == "refuses" else "cannot be reached") in said[0]
    (run,) = wandb_files(tmp_path / "run")
    assert run.rows() == expected_rows(tmp_path / "run")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_key_that_cannot_be_one_is_said(base_flags, tmp_path, wandb_here, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert train_here(**{**base_flags, "num_train_epochs": 1}, report_to="wandb") == 0
    assert "W&B: offline (WANDB_API_KEY invalid" in capsys.readouterr().out
    assert len(wandb_files(tmp_path / "run")) == 1


# --- trackers that fail


@pytest.mark.case(
    "W&B's own process is killed in the middle",
    "a warning; the run, metrics.jsonl and the other tracker go on",
)
def test_the_death_of_wandbs_service_costs_a_warning(base_flags, tmp_path, wandb_here, monkeypatch, capsys):
    import psutil

    from ft.tracking import Tracker

    log = Tracker.log

    def killing(self, step, *rest):
        if step == 4:
            for child in psutil.Process().children(recursive=True):
                if child.name().startswith("wandb-core"):
                    child.kill()
                    child.wait()
            time.sleep(0.5)
        log(self, step, *rest)

    monkeypatch.setattr(Tracker, "log", killing)
    assert train_here(**base_flags, report_to="wandb,tensorboard") == 0
    said = capsys.readouterr().err
    assert said.count("warning: wandb failed, and gets no more numbers") == 1
    assert [row["step"] for row in metrics_of(tmp_path / "run") if "train/loss" in row] == list(range(1, 15))
    events = read_tensorboard(tmp_path / "run/tensorboard")
    assert len(events.Scalars("train/loss")) == 14  # the other tracker continues


@pytest.mark.case(
    "a tracker fails in the middle",
    "a warning; metrics.jsonl is whole",
)
def test_a_tracker_that_fails_on_the_way_is_dropped_and_the_run_goes_on(
    base_flags, tmp_path, monkeypatch, capsys
):
    from accelerate.tracking import TensorBoardTracker

    log, steps = TensorBoardTracker.log, []

    def failing(self, values, step=None, **kwargs):
        steps.append(step)
        if step == 3:
            raise ConnectionError("gone\nand more lines")
        log(self, values, step=step, **kwargs)

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    assert train_here(**base_flags, report_to="tensorboard") == 0
    assert steps == [1, 2, 3]  # it is not called again
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == [
        "warning: tensorboard failed, and gets no more numbers; metrics.jsonl has them all (gone)"
    ]
    assert len(metrics_of(tmp_path / "run")) == 14 + 2
    assert (tmp_path / "run/results.json").exists()


@pytest.mark.case("a tracker hangs in the middle", "a warning; the run goes on, metrics.jsonl is whole")
def test_a_tracker_that_hangs_is_dropped_and_the_run_goes_on(base_flags, tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    from ft import tracking

    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *args, **options: time.sleep(3600))
    assert train_here(**base_flags, report_to="tensorboard") == 0
    assert "warning: tensorboard failed, and gets no more numbers" in capsys.readouterr().err
    assert len(metrics_of(tmp_path / "run")) == 14 + 2


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_service_of_wandb_that_answers_no_more_holds_up_nothing(
    base_flags, tmp_path, wandb_here, monkeypatch, capsys, where
):
    """Ending the run waits for it, too."""
    import wandb
    from accelerate.tracking import WandBTracker

    from ft import tracking

    def hang(*args, **options):
        time.sleep(3600)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "ANSWER_SECONDS", 2.0)
        patch.setattr(WandBTracker, where, hang)
        patch.setattr(wandb, "teardown", hang)
        assert train_here(**base_flags, report_to="wandb") == 0
    assert "warning: wandb failed, and gets no more numbers" in capsys.readouterr().err
    assert len(metrics_of(tmp_path / "run")) == 14 + 2


@pytest.mark.case(
    "a tracker that does not start",
    "a warning; the others have all numbers",
)
def test_a_tracker_that_does_not_start_takes_no_other_along(
    base_flags, tmp_path, wandb_here, monkeypatch, capsys
):
    from accelerate.tracking import TensorBoardTracker

    def failing(self):
        raise PermissionError("not yours")

    monkeypatch.setattr(TensorBoardTracker, "start", failing)
    assert train_here(**base_flags, report_to="tensorboard,wandb") == 0
    assert "warning: tensorboard did not start, and gets no numbers (not yours)" in capsys.readouterr().err
    (run,) = wandb_files(tmp_path / "run")
    assert run.rows() == expected_rows(tmp_path / "run")


def test_a_tracker_that_fails_at_the_end_does_not_spoil_it(base_flags, tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def failing(self):
        raise TimeoutError

    monkeypatch.setattr(TensorBoardTracker, "finish", failing)
    assert train_here(**base_flags, report_to="tensorboard") == 0
    assert "warning: tensorboard failed" in capsys.readouterr().err


# --- non-finite numbers


def test_a_loss_that_is_not_a_number_is_written_and_shown(base_flags, tmp_path, wandb_here):
    words = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    words |= {"train_file": base_flags["dataset_name"] / "train.csv", "eval_strategy": "no"}
    words |= {
        "learning_rate": 1e30,
        "max_train_steps": 5,
        "on_nonfinite": "skip",
        "report_to": "wandb,tensorboard",
    }
    assert train_here(**words, drawn=True) == 0

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    rows = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["train/loss"] == "NaN"
    (run,) = wandb_files(tmp_path / "run")
    assert [row["step"] for row in run.rows()] == [row["step"] for row in rows]
    # One alert for any number of updates in a row.
    ((title, level, text),) = run.alerts
    assert (title, level) == ("The loss or gradient is not finite", "ERROR") and "is skipped" in text
    events = read_tensorboard(tmp_path / "run/tensorboard")
    assert math.isnan(events.Scalars("train/loss")[-1].value)
    assert (tmp_path / "run/training.png").stat().st_size > 1000


# --- the others


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_has_the_same_numbers(base_flags, tmp_path):
    assert train_here(**base_flags, report_to="tensorboard") == 0
    events = read_tensorboard(tmp_path / "run/tensorboard")
    rows = expected_rows(tmp_path / "run")
    keys = {key for row in rows for key in row} - {"step"}
    assert set(events.Tags()["scalars"]) == keys  # step is the axis, not a series
    for key in keys:
        found = [(event.step, event.value) for event in events.Scalars(key)]
        wanted = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row]
        assert found == wanted, key
    (hparams,) = (tmp_path / "run/tensorboard").glob("*/hparams.yml")
    assert yaml.safe_load(hparams.read_text())["learning_rate"] == 1e-3


def test_trackio_has_the_same_numbers_without_a_network(base_flags, tmp_path, serve):
    """trackio 0.43 requires an older pillow than the rest, so the dev extra leaves it out."""
    pytest.importorskip("trackio", reason="pip install '.[trackio]'")
    proxy, output = serve(200), tmp_path / "run"
    surroundings = {
        "HTTP_PROXY": proxy.url,
        "HTTPS_PROXY": proxy.url,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    words = flags(**base_flags, report_to="trackio")
    for more in (["--max_train_steps", "7"], ["--resume_from_checkpoint", "latest"]):
        done = launch(ONE, [*words, *more], **surroundings)
        assert done.returncode == 0, done.stderr
    assert proxy.requests == []
    with sqlite3.connect(tmp_path / "trackio/ft.db") as database:
        found = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        configs = [json.loads(config) for (config,) in database.execute("select config from configs")]
    assert len({run_id for run_id, *_ in found}) == 1 and {name for _, name, *_ in found} == {"run"}
    assert [{"step": step, **json.loads(values)} for _, _, step, values in found] == expected_rows(output)
    assert configs[0]["learning_rate"] == 1e-3


def test_all_are_those_that_are_installed(base_flags, tmp_path, wandb_here, monkeypatch):
    import ft.tracking

    there = ("wandb", "tensorboard")
    monkeypatch.setattr(ft.tracking, "is_installed", lambda name: name in there)
    assert train_here(**{**base_flags, "num_train_epochs": 1}, report_to="all") == 0
    assert all((tmp_path / "run" / name).is_dir() for name in there)


def test_no_tracker_is_imported_where_none_is_asked_for(base_flags, tmp_path):
    """Nor by the process that a fork comes from, which has done all imports of a run."""
    (tmp_path / "script.py").write_text(
        "import runpy, sys\n"
        f"try:\n    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('imported', sorted({'wandb', 'tensorboard', 'trackio'} & set(sys.modules)))\n"
        "    raise\n"
    )
    words = flags(**{**base_flags, "max_train_steps": 1})
    done = launch(FORK, words, script=str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr
    assert "imported []" in done.stdout
