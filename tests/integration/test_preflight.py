"""`train.py --preflight`: what it finds in data and machine, what it leaves behind, and how it ends."""

import gzip
import json
import os
import shutil
import signal
import time

import pytest
from conftest import FORK, FORKS, flags, launch, make_rows, train_here, write_csv

import ft.best
import ft.checkpoint
from ft.assess import assess
from ft.cli import parse
from ft.config import Config
from ft.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from ft.preflight import preflight
from ft.preflight.audit import audit, audit_apart
from ft.preflight.forecast import forecast

KEYS = {
    "fit", "findings", "rows", "notes", "sources", "copies", "near_copies", "conflicts", "tokens", "labels",
    "floors", "launch", "longest_update", "checkpoint", "forecast",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _audit_here(monkeypatch):
    """In this process, where the imports are done; launched ones audit in a separate process."""
    monkeypatch.setattr("ft.preflight.audit.audit_apart", audit)


@pytest.fixture
def data(reviews, tmp_path):
    """A copy of the reviews, to be corrupted."""
    return shutil.copytree(reviews, tmp_path / "data")


@pytest.fixture
def audited(data, base_flags):
    """The audit of the corrupted copy: its report, and its findings as {topic: messages}."""

    def run(**values):
        report, findings = audit(parse(Config, flags(**{**base_flags, "dataset_name": data, **values})))
        topics = {}
        for finding in findings.all:
            topics.setdefault((finding.level, finding.topic), []).append(finding.message)
        return report, topics

    return run


def append(data, split, *rows):
    path = data / f"{split}.csv"
    text = path.read_text()
    path.write_text(text + "".join(f"{text_},{label}\n" for text_, label in rows))


# --- the data


def test_good_data_is_described_and_nothing_blocks(audited):
    report, topics = audited()
    assert {split: facts["used"] for split, facts in report["rows"].items()} == {
        "train": 203, "validation": 61, "test": 47,
    }  # fmt: skip
    assert sum(report["labels"]["counts"]["train"].values()) == 203
    assert set(report["labels"]["counts"]["train"]) == {"bad", "fine", "good"}
    assert report["tokens"]["max_length"] == 64
    floors = report["floors"]
    assert floors["prior"]["accuracy"] < floors["tf_idf"]["accuracy"] <= 1
    assert not [topic for level, topic in topics if level == "blocking"]


def test_all_faults_are_found_and_not_the_first_alone(audited, data):
    append(data, "train", ("", "good"), ("   ", "bad"), ("no label here", ""))
    append(data, "validation", ("the film was odd", "strange"), ("the book was odd", "weird"))
    report, topics = audited(max_length=3000)
    assert "text is empty: row 203;" in topics["blocking", "bad_rows"][0]
    assert report["rows"]["train"]["bad"] == {
        "text is empty": {"rows": 1, "first": [203]},
        "text is only white space": {"rows": 1, "first": [204]},
        "label is missing": {"rows": 1, "first": [205]},
    }
    said = topics["blocking", "labels"][0]
    assert "the label column 'label'" in said and "which training lacks" in said
    assert report["labels"]["unknown"] == {"validation": ["strange", "weird"]}
    assert topics["blocking", "model"][0].startswith("max_length: found 3000")
    assert set(report["copies"]["within"]) == {"train", "validation", "test"}  # still looked for


def test_bad_rows_that_are_dropped_are_a_warning(audited, data):
    append(data, "train", ("", "good"))
    report, topics = audited(on_bad_rows="drop")
    assert ("blocking", "bad_rows") not in topics
    assert "dropped 1 of 204 rows" in topics["warning", "bad_rows"][0]
    assert report["rows"]["train"]["read"] == 204 and report["rows"]["train"]["used"] == 203


def test_lines_that_are_not_utf8_are_all_named_and_the_rest_is_looked_at(audited, data):
    path = data / "train.csv"
    path.write_bytes(path.read_bytes() + b"caf\xe9 was great,good\nplain and usual,fine\nna\xefve film,bad\n")
    report, topics = audited()
    assert "2 lines are not UTF-8: 205, 207" in topics["blocking", "not_utf8"][0]
    assert report["rows"]["train"]["read"] == 206


@pytest.mark.parametrize("gzipped", [True, False])
def test_a_file_that_is_not_whole_is_a_finding(audited, data, gzipped):
    content = gzip.compress((data / "train.csv").read_bytes())[:-20] if gzipped else b"no gzip file"
    (data / "train.csv").unlink()
    (data / "train.csv.gz").write_bytes(content)
    _, topics = audited()
    assert "train.csv.gz: is not a whole gzip file" in topics["blocking", "data"][0]


def test_a_single_class_blocks(audited, data):
    write_csv(data / "train.csv", [{"text": f"text {i}", "label": "good"} for i in range(20)])
    report, topics = audited()
    assert "holds a single class ('good')" in topics["blocking", "labels"][0]
    assert "floors" not in report and report["tokens"]["splits"]["train"]["longest"] > 0


def test_copies_across_splits_conflicts_and_missing_labels_are_warnings(audited, data):
    shared = "a book that we saw and it was the best"
    append(data, "train", (shared, "good"), ("one and the same text here", "bad"))
    append(data, "train", ("one and the same text here", "fine"), ("the last one of these", "Good"))
    append(data, "test", (shared, "good"))
    write_csv(data / "validation.csv", [row for row in make_rows(60, 1) if row["label"] != "fine"])
    report, topics = audited()
    assert report["copies"]["across"]["test in train"] == {"rows": 1, "first": [[47, 203]]}
    assert "row 47 as 203" in topics["warning", "copies_across"][0]
    assert "train row 204 'bad', train row 205 'fine'" in topics["warning", "conflicts"][0]
    assert "validation: no row has the labels 'Good', 'fine'" in topics["warning", "lacking_labels"][0]
    assert "'Good' and 'good' differ only in case" in topics["warning", "label_names"][0]
    assert not [topic for level, topic in topics if level == "blocking"]


def test_texts_that_are_cut_are_a_warning_with_the_length_that_keeps_them(audited):
    report, topics = audited(max_length=10)
    share = report["tokens"]["splits"]["train"]["cut_share"]
    assert share > 0.5 and report["tokens"]["keeps_99_percent"] > 30
    assert "are cut at max_length 10;" in topics["warning", "cut"][0]


@pytest.mark.parametrize(
    "options, where, remedy",
    [
        ({}, "max_length 10;", "long_text: windows sees"),
        ({"long_text": "windows", "max_windows": 2}, "max_length 10 in 2 windows;", "a higher max_windows"),
    ],
)
def test_texts_that_are_cut_have_a_remedy(audited, options, where, remedy):
    _, topics = audited(max_length=10, **options)
    (warning,) = topics["warning", "cut"]
    assert where in warning and remedy in warning


def test_pairs_that_are_cut_are_not_told_of_windows_which_are_for_one_text(audited, data):
    for split, count in ("train", 203), ("validation", 61), ("test", 47):
        write_csv(data / f"{split}.csv", [{"other": "so it is", **row} for row in make_rows(count)])
    _, topics = audited(max_length=10, text_column_names="text,other")
    (warning,) = topics["warning", "cut"]
    assert "cut at max_length 10;" in warning and "windows" not in warning


def test_the_test_rows_do_not_move_the_floors(audited, data):
    before = audited()[0]["floors"]
    write_csv(data / "test.csv", make_rows(80, seed=9))
    assert audited()[0]["floors"] == before


def test_a_missing_file_and_a_missing_column_are_findings(audited):
    _, topics = audited(text_column_names="review")
    assert "has no column 'review'" in topics["blocking", "data"][0]
    _, topics = audited(dataset_name="/nowhere/at/all")
    assert "does not exist" in topics["blocking", "data"][0]


# --- all of it


def test_a_fit_config_ends_with_0_and_leaves_a_report_that_no_run_minds(base_flags, tmp_path, capfd):
    assert train_here(**base_flags, preflight=True) == EXIT_DONE
    out = tmp_path / "run"
    assert [path.name for path in out.iterdir()] == ["preflight.json"]
    report = json.loads((out / "preflight.json").read_text())
    assert report.keys() == KEYS and report["fit"] is True
    assert report["launch"] == {"processes": 1, "device": "cpu", "mixed_precision": "no"}
    forecast = report["forecast"]
    assert (forecast["updates"], forecast["evaluations"], forecast["saves"]) == (14, 2, 2)
    assert set(forecast["seconds"]) == {"start", "updates", "evaluations", "saves", "end"}
    assert forecast["total_seconds"] == pytest.approx(sum(forecast["seconds"].values()))
    assert 0 < forecast["peak_memory_bytes"] < forecast["memory_bytes"]
    assert report["checkpoint"]["same"] is True and report["checkpoint"]["bytes"] > 0
    assert report["longest_update"]["rows"] == 32
    said = capfd.readouterr().out
    assert len(said.splitlines()) <= 40 and "FORECAST time:" in said and "\nfit (written: " in said
    assert train_here(**base_flags) == EXIT_DONE  # the same output_dir
    assert (out / "results.json").exists() and (out / "preflight.json").exists()


def test_a_checkpoint_is_read_back_as_a_run_reads_it_with_one_state_of_the_optimizer(base_flags, monkeypatch):
    """With two, a run that fits on a device would be reported not to fit."""
    states, restore = [], ft.checkpoint.restore

    def restored(path, accelerator, model, optimizer, scheduler):
        states.append(len(optimizer.state))
        return restore(path, accelerator, model, optimizer, scheduler)

    monkeypatch.setattr(ft.checkpoint, "restore", restored)
    assert train_here(**base_flags, preflight="true") == 0
    assert states == [0]
    report = json.loads((base_flags["output_dir"] / "preflight.json").read_text())
    assert report["checkpoint"]["same"]


def test_the_preflight_changes_nothing_of_the_run(base_flags, tmp_path):
    from compare import same_bits

    short = {**base_flags, "max_train_steps": 4}
    assert train_here(**{**short, "output_dir": tmp_path / "without"}) == EXIT_DONE
    assert train_here(**short, preflight=True) == train_here(**short) == EXIT_DONE
    assert same_bits(tmp_path / "without" / "final", tmp_path / "run" / "final")


def test_blocking_findings_are_listed_at_the_end_with_exit_code_2(base_flags, data, tmp_path, capfd):
    append(data, "train", ("", "good"))
    append(data, "validation", ("the film was odd", "strange"))
    values = {**base_flags, "dataset_name": data}
    assert train_here(**values, preflight=True) == EXIT_USER_ERROR
    lines = capfd.readouterr().out.splitlines()
    blocking = [line for line in lines if line.startswith("BLOCKING: ")]
    assert len(blocking) == 2 and lines[-1].startswith("NOT FIT: 2 blocking findings")
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["fit"] is False and "forecast" not in report
    assert train_here(**{**base_flags, "max_train_steps": 2}) == EXIT_DONE


@pytest.mark.parametrize("missing", ["train", "validation", "test"])
def test_a_file_that_is_missing_hides_no_fault_of_the_others(base_flags, data, tmp_path, missing):
    splits = ("train", "validation", "test")
    for split in splits:
        (data / f"{split}.csv").write_bytes(b"text,label\ncaf\xe9,good\nbad,bad\n")
    (data / f"{missing}.csv").unlink()
    values = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    values |= {f"{split}_file": data / f"{split}.csv" for split in splits}
    assert train_here(**values, preflight=True) == EXIT_USER_ERROR
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    blocking = [f["message"] for f in report["findings"] if f["level"] == "blocking"]
    assert len(blocking) == 3
    assert all(f"{split}.csv" in " ".join(blocking) for split in splits)


def test_bad_rows_block_and_the_machine_is_tried_all_the_same(base_flags, data, tmp_path):
    append(data, "train", ("", "good"))
    assert train_here(**{**base_flags, "dataset_name": data}, preflight=True) == EXIT_USER_ERROR
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert [f["topic"] for f in report["findings"] if f["level"] == "blocking"] == ["bad_rows"]
    assert report["forecast"]["updates"] == 14


def blocking_of(folder):
    report = json.loads((folder / "preflight.json").read_text())
    return [f["topic"] for f in report["findings"] if f["level"] == "blocking"]


def test_nothing_is_tried_where_next_to_no_memory_is_free(base_flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("ft.preflight.memory.free_host_bytes", lambda: 2**20)
    assert train_here(**base_flags, preflight=True) == EXIT_USER_ERROR
    assert blocking_of(tmp_path / "run") == ["memory"] and "too little to try" in capfd.readouterr().out
    assert not list((tmp_path / "run").glob(".preflight*"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        ImportError("_ccallback_c.so: cannot map zero-fill pages"),
        UserError("model_name_or_path: 'm' cannot be loaded: OSError: Cannot allocate memory (os error 12)"),
    ],
)
def test_what_the_memory_does_not_hold_blocks(base_flags, tmp_path, error):
    def train(config, run_class):
        raise error

    assert preflight(parse(Config, flags(**base_flags)), train) == EXIT_USER_ERROR
    assert blocking_of(tmp_path / "run") == ["memory"]


def test_an_error_of_another_kind_is_raised_unless_no_memory_was_left(base_flags, tmp_path, monkeypatch):
    def train(config, run_class):
        raise SystemError("error return without exception set")

    with pytest.raises(SystemError):
        preflight(parse(Config, flags(**base_flags)), train)
    monkeypatch.setattr("ft.preflight.memory.headroom", lambda: 2**20)
    assert preflight(parse(Config, flags(**base_flags)), train) == EXIT_USER_ERROR
    assert blocking_of(tmp_path / "run") == ["memory"]


def test_an_output_dir_that_holds_a_run_and_a_hub_out_of_reach_block_and_all_stays_as_it_is(
    base_flags, tmp_path
):
    short = {**base_flags, "max_train_steps": 2}
    assert train_here(**short) == EXIT_DONE

    def times():
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.name != "preflight.json"}

    before = times()
    assert train_here(**short, preflight=True, push_to_hub=True) == EXIT_USER_ERROR
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    blocking = [f["topic"] for f in report["findings"] if f["level"] == "blocking"]
    assert blocking == ["output_dir", "push_to_hub"]  # the latter as HF_HUB_OFFLINE is set
    assert times() == before and len(before) > 10


def test_what_is_left_of_a_run_is_forecast_where_it_goes_on(base_flags, tmp_path, monkeypatch):
    assert train_here(**{**base_flags, "max_train_steps": 6}) == EXIT_DONE
    monkeypatch.setattr(ft.best, "_copy", None)  # the run has its best/ where it is
    resumed = {**base_flags, "max_train_steps": 14, "resume_from_checkpoint": "latest"}
    assert train_here(**resumed, preflight=True) == EXIT_DONE
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["forecast"]["updates"] == 8
    assert not any(".preflight" in note for note in report["notes"])  # about the probe's own folder
    assert train_here(**resumed) == EXIT_DONE


def test_a_run_that_never_evaluates_is_forecast_though_it_has_validation_rows(base_flags, tmp_path):
    assert train_here(**base_flags, eval_strategy="no", preflight=True) == EXIT_DONE
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["forecast"]["evaluations"] == report["forecast"]["seconds"]["evaluations"] == 0
    assert report["forecast"]["seconds"]["end"] > 0  # the test rows are scored


def report_of(folder):
    return json.loads((folder / "preflight.json").read_text())


def test_a_finished_run_that_goes_on_is_said_to_have_nothing_left(base_flags, tmp_path, capfd):
    short = {**base_flags, "max_train_steps": 6}
    assert train_here(**short) == EXIT_DONE
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train_here(**short, resume_from_checkpoint="latest", preflight=True) == EXIT_DONE
    assert "warning: nothing was tried or forecast: all 6 updates" in capfd.readouterr().out
    assert "forecast" not in report_of(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert not list((tmp_path / "run").glob(".preflight*"))


def test_the_folder_of_several_seeds_is_judged_as_the_run_judges_it(base_flags, tmp_path):
    fresh = {**base_flags, "max_train_steps": 2}
    short = {**fresh, "resume_from_checkpoint": "latest"}
    (tmp_path / "run" / "seed-0").mkdir(parents=True)
    (tmp_path / "run" / "seeds.json").write_text('{"0": null}')
    assert train_here(**short, num_seeds=2, preflight=True) == EXIT_DONE
    forecast = report_of(tmp_path / "run")["forecast"]
    assert (forecast["runs"], forecast["updates"]) == (2, 2)
    assert train_here(**short, preflight=True) == EXIT_USER_ERROR
    one = {"output_dir": tmp_path / "one"}
    assert train_here(**{**fresh, **one}) == EXIT_DONE
    assert train_here(**{**short, **one}, num_seeds=2, preflight=True) == EXIT_USER_ERROR
    assert blocking_of(tmp_path / "one") == ["output_dir"]


def test_a_run_without_validation_rows_is_forecast_without_evaluations(base_flags, tmp_path, data):
    (data / "validation.csv").unlink()
    values = {**base_flags, "dataset_name": data, "validation_split_percentage": 0, "preflight": True}
    assert train_here(**values) == EXIT_DONE
    forecast = report_of(tmp_path / "run")["forecast"]
    assert forecast["evaluations"] == forecast["seconds"]["evaluations"] == 0


def test_what_follows_an_evaluation_is_forecast_for_all_rows_and_resamples(base_flags, tmp_path, monkeypatch):
    """Although few rows are scored, and few resamples drawn."""
    seen, measured, waited, found = [], [], [], {}

    def slow(task, data, split, result, resamples):
        seen.append((split, len(result.scores), len(data.splits[split])))
        waited.append(resamples / 1000)  # seconds
        if split not in found:  # else the machine's own time would be scaled to all resamples, too
            found[split] = assess(task, data, split, result, resamples)
        return found[split]

    def kept(config, found, *rest):
        measured.append(found)
        return forecast(config, found, *rest)

    monkeypatch.setattr("ft.run.assess", slow)
    monkeypatch.setattr("ft.preflight.probe.Probe._now", lambda _: time.perf_counter() + sum(waited))
    monkeypatch.setattr("ft.preflight.forecast.forecast", kept)
    assert train_here(**base_flags, per_device_eval_batch_size=1, preflight=True) == EXIT_DONE
    assert set(seen) == {("validation", 61, 61), ("test", 47, 47)}
    report = report_of(tmp_path / "run")
    assert 2 * 8 < report["forecast"]["seconds"]["end"] < 2 * 20  # 10 s of waiting for each of two splits


def test_two_processes_speak_with_one_voice(base_flags, tmp_path):
    done = launch(FORKS, [*flags(**base_flags), "--preflight"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("FORECAST time:") == 1
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["launch"]["processes"] == 2 and report["fit"] is True


def test_python_train_hands_the_code_on_without_a_traceback(base_flags, data):
    append(data, "validation", ("the film was odd", "strange"))
    done = launch(FORK, [*flags(**{**base_flags, "dataset_name": data}), "--preflight"])
    assert done.returncode == EXIT_USER_ERROR and "Traceback" not in done.stdout + done.stderr
    assert "BLOCKING: validation data: the label column 'label': row 61: found the" in done.stdout


def killed(config):
    """Replaces an audit for which memory does not suffice."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_audit_that_is_killed_is_a_message(base_flags, monkeypatch):
    monkeypatch.setattr("ft.preflight.audit.audit", killed)
    with pytest.raises(UserError, match=r"preflight: the process that looks at the data was killed"):
        audit_apart(parse(Config, flags(**base_flags)))


def test_windows_are_tried_as_the_run_scores_them(base_flags, tmp_path):
    """Evaluation batches are sized in windows, not rows; a text in windows is not cut."""
    words = {"long_text": "windows", "max_length": 10, "max_windows": 99, "per_device_eval_batch_size": 7}
    assert train_here(**base_flags, **words, preflight=True) == EXIT_DONE
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["tokens"]["splits"]["train"]["cut_rows"] == 0
    assert "cut" not in [finding["topic"] for finding in report["findings"]]
    assert report["forecast"]["seconds"]["evaluations"] > 0


@pytest.mark.usefixtures("heeds_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_promises_no_checkpoint(base_flags, monkeypatch, capfd, number):
    from ft.tasks.text_classification import TextClassification

    def told(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(TextClassification, "loss", told)
    with pytest.raises(SystemExit) as stop:
        train_here(**base_flags, preflight="true")
    assert stop.value.code == 128 + number  # and not 75: there is nothing to resume
    assert "checkpoint" not in capfd.readouterr().err
