"""Trackers: an offline W&B run and TensorBoard's files hold the series of metrics.jsonl; one run, one id."""

import json
import math
import struct

import pytest
from conftest import flags, launch, metrics_of, train_here, two_processes


def records_of(content):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; a record may be cut into first,
    middle and last pieces) behind a header of 7 bytes."""
    whole, position = b"", 7
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if left < 7 or kind == 0:
            position += left
            continue
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def read_wandb(output_dir):
    """History rows, config and summary of the offline runs below a run's folder, and their ids."""
    from wandb.proto import wandb_internal_pb2

    history, config, summary, ids = [], {}, {}, set()
    for path in sorted((output_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                history.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
            elif kind == "run":
                ids.add(record.run.run_id)
                for item in record.run.config.update:
                    config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            elif kind == "config":
                for item in record.config.update:
                    config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            elif kind == "summary":
                for item in record.summary.update:
                    summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return history, config, summary, ids


def assert_same_series(rows, output_dir):
    """Each number of metrics.jsonl stands in W&B's history under its step."""
    wanted = [(row["step"], key, value) for row in metrics_of(output_dir) for key, value in row.items()]
    there = {(row["step"], key): value for row in rows for key, value in row.items() if "step" in row}
    for step, key, value in wanted:
        if value is not None:
            assert there[step, key] == pytest.approx(value), (step, key)


def test_without_a_key_wandb_runs_offline_and_says_how_to_upload(base_flags, tmp_path):
    done = launch(["python"], flags(**base_flags, report_to="wandb", run_name="mine"))
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 1 and f"wandb sync {folders[0]}" in done.stdout
    history, config, summary, _ = read_wandb(tmp_path / "run")
    assert_same_series(history, tmp_path / "run")
    assert {"train/loss", "eval/accuracy", "perf/tokens_per_second"} <= {
        key for row in history for key in row
    }
    assert config["learning_rate"] == 1e-3 and config["seed"] == 42
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (
        summary["best/accuracy"] == results["best/accuracy"] and summary["test/loss"] == results["test/loss"]
    )


def test_two_processes_make_one_run_and_a_resumed_run_goes_on_under_its_id(base_flags, tmp_path):
    words = {**base_flags, "report_to": "wandb", "num_train_epochs": 3}
    done = launch(two_processes(), flags(**words, max_train_steps=7))
    assert done.returncode == 0, done.stderr
    first = read_wandb(tmp_path / "run")
    assert len(first[3]) == 1
    # The schedule may be as long as it was; the total may grow on purpose.
    done = launch(two_processes(), flags(**words, resume_from_checkpoint="latest"))
    assert done.returncode == 0, done.stderr
    history, _, _, ids = read_wandb(tmp_path / "run")
    assert ids == first[3]
    assert_same_series(history, tmp_path / "run")
    assert max(row["step"] for row in history if "step" in row) == 21


def test_tensorboard_has_the_same_numbers(base_flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_here(**base_flags, report_to="tensorboard") == 0
    found = {}
    for path in (tmp_path / "run").rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found |= {(event.step, tag): event.value for event in events.Scalars(tag)}
    for row in metrics_of(tmp_path / "run"):
        for key in ("train/loss", "eval/accuracy"):
            if key in row:
                assert found[row["step"], key] == pytest.approx(row[key], rel=1e-5)


def test_a_tracker_that_fails_does_not_end_the_run(base_flags, tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    calls = []

    def failing(self, values, step=None, **kwargs):
        calls.append(step)
        raise ConnectionError("gone")

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    assert train_here(**base_flags, report_to="tensorboard") == 0
    assert len(calls) == 1  # it is not asked again
    assert "tensorboard" in capsys.readouterr().out
    assert len(metrics_of(tmp_path / "run")) == 14 + 2


def test_no_secret_is_in_any_file(base_flags, tmp_path):
    secret = "0123456789abcdef0123456789abcdef01234567"
    words = flags(**base_flags, report_to="wandb")
    done = launch(
        ["python"], words, WANDB_API_KEY=secret, HF_TOKEN="hf_" + secret, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stdout  # a key, but no way to the server
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_number_that_is_none_is_written_as_strict_json(tmp_path):
    from ft.tracking import strict

    row = strict({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    expected = {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5}
    assert json.loads(json.dumps(row, allow_nan=False)) == expected
