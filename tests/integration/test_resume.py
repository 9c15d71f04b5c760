"""Nothing lost: a stopped run continues as if it had not been."""

import gc
import json
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from compare import KEYS_BIAS, assert_same, results_in, same_bits, without_timing
from conftest import FORK, FORKS, ROOT, flags, launch, series, train_here, two_processes, wait_for
from safetensors import SafetensorError

from ft import checkpoint, durable
from ft.errors import EXIT_STOPPED, UserError
from ft.evaluation import evaluate
from ft.launch import kill_launch
from ft.run import Run
from ft.verify import weights_difference


def words_of(model, data, folder):
    """Flags for 30 updates with a checkpoint every 4th, also in the middle of an epoch."""
    return {
        "model_name_or_path": model, "dataset_name": data, "output_dir": folder, "num_train_epochs": 9,
        "max_train_steps": 30, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps",
        "eval_steps": 5, "logging_steps": 3, "save_total_limit": 50, "learning_rate": 3e-3,
        "weight_decay": 0.01,
    }  # fmt: skip


@pytest.fixture
def config(tiny_model, reviews, tmp_path):
    return words_of(tiny_model, reviews, tmp_path / "run")


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """The run that was never stopped. Must not be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(**words_of(tiny_model, reviews, folder)) == 0
    before = times_of(folder)
    yield folder
    assert times_of(folder) == before


@pytest.fixture
def finished(whole, config):
    """A copy of it in the output_dir of `config`, to continue."""
    return shutil.copytree(whole, config["output_dir"])


def test_processes_may_spell_the_folder_of_the_run_in_their_own_ways(config, tmp_path):
    """As on hosts that have it in different places; one process decides which checkpoint is the run's own."""
    words = {**config, "max_train_steps": 4}
    del words["output_dir"]
    own = [flags(output_dir=f"{folder}/run") for folder in (tmp_path, os.path.relpath(tmp_path, ROOT))]
    (tmp_path / "own.json").write_text(json.dumps(own))

    def launched(**more):
        return launch(FORKS, [str(tmp_path / "own.json"), *flags(**words | more)], script="tests/own.py")

    assert launched().returncode == 0
    done = launched(max_train_steps=6, resume_from_checkpoint="latest")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout
    assert {"step-00000004", "step-00000006"} <= {p.name for p in (tmp_path / "run/checkpoints").iterdir()}


def cut_at(whole, step, place):
    """A copy of a run as left by a crash between `step` and the next checkpoint."""
    shutil.copytree(whole, place)
    for folder in (place / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(place / "final")
    (place / "results.json").unlink()
    with open(place / "metrics.jsonl", "a") as file:
        file.write('{"step": 29, "epo')  # a truncated row
    return place


@pytest.mark.parametrize("step", [4, 12, 16, 28])
def test_a_resumed_run_ends_bit_identical(config, whole, tmp_path, step):
    place = cut_at(whole, step, tmp_path / "cut")
    assert train_here(**{**config, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", place / "final")
    assert without_timing(whole) == without_timing(place)
    assert results_in(whole) == results_in(place)


def test_what_torch_itself_draws_is_drawn_again_after_a_resume(config, tmp_path):
    """No generator state is saved: each update's follows from the seed and its number."""
    words = {**config, "dropout_mode": "torch"}
    assert train_here(**words) == 0
    place = cut_at(tmp_path / "run", 12, tmp_path / "cut")
    assert train_here(**{**words, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert same_bits(tmp_path / "run/final", place / "final")


def test_another_number_of_processes_continues_the_trajectory(config, whole, tmp_path):
    place = cut_at(whole, 12, tmp_path / "cut")
    words = flags(**{**config, "output_dir": place}, resume_from_checkpoint="latest")
    done = launch(FORKS, words)
    assert done.returncode == 0, done.stderr
    assert_same(whole, place)


def test_fewer_processes_continue_the_trajectory_too(config, whole, tmp_path):
    done = launch(FORKS, flags(**{**config, "output_dir": tmp_path / "two"}))
    assert done.returncode == 0, done.stderr
    place = cut_at(tmp_path / "two", 12, tmp_path / "cut")
    assert train_here(**{**config, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert_same(whole, place)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_started_again_by_the_same_command_ends_bit_identical(
    config, whole, started, tmp_path, processes
):
    first, again, unbroken = FORK, FORK, whole
    if processes == 2:
        first, again, unbroken = two_processes(), FORKS, tmp_path / "unbroken"
        assert launch(FORKS, flags(**{**config, "output_dir": unbroken})).returncode == 0
    words = flags(**config, resume_from_checkpoint="latest")
    process = started(first, words)
    wait_for(tmp_path / "run/checkpoints/step-00000008/manifest.json", process)
    kill_launch(process)
    assert "a checkpoint follows" not in process.communicate(timeout=10)[1]
    done = launch(again, words)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert same_bits(unbroken / "final", tmp_path / "run/final")
    assert without_timing(unbroken) == without_timing(tmp_path / "run")


def test_latest_without_a_checkpoint_starts_anew_and_says_so(config, tmp_path, capsys):
    assert train_here(**{**config, "max_train_steps": 2}, resume_from_checkpoint="latest") == 0
    assert "no checkpoint to resume from" in capsys.readouterr().out


def test_a_finished_run_resumed_does_no_update_and_gives_the_same_results(config, finished):
    before = results_in(finished)
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert results_in(finished) == before


@pytest.mark.parametrize("name", ["step-00000012", "latest"])
def test_resume_from_a_named_checkpoint(config, whole, tmp_path, name):
    words = {**config, "output_dir": tmp_path / "other"}
    assert train_here(**words, resume_from_checkpoint=whole / "checkpoints" / name) == 0
    assert same_bits(whole / "final", tmp_path / "other/final")


def test_stopped_before_its_first_update_a_run_from_elsewhere_has_a_checkpoint_of_its_own(
    config, whole, tmp_path
):
    """All updates were done in the other folder: it is stopped while scoring the test rows."""
    words = {**config, "output_dir": tmp_path / "other"}
    last = whole / "checkpoints/step-00000030"
    assert train_here(**words, resume_from_checkpoint=last, max_time="1s") == EXIT_STOPPED
    assert (tmp_path / "other/checkpoints/step-00000030/manifest.json").exists()
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", tmp_path / "other/final")


def test_stopped_while_the_best_model_scores_the_test_rows_a_run_saves_the_last_one(
    config, whole, tmp_path, monkeypatch
):
    words = {**config, "output_dir": tmp_path / "other", "save_strategy": "no"}
    score = Run.score

    def out_of_time(run, split, **rest):
        if split == "test":
            run.max_seconds = 0.0
        return score(run, split, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "score", out_of_time)
        assert train_here(**words) == EXIT_STOPPED
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert json.loads((tmp_path / "other/results.json").read_text())["best/step"] == 20
    assert same_bits(whole / "final", tmp_path / "other/final")


@pytest.fixture
def without_best(whole, tmp_path):
    """A copy of only its checkpoints."""
    shutil.copytree(whole / "checkpoints", tmp_path / "copied/checkpoints")
    return tmp_path / "copied"


def test_a_checkpoint_that_is_taken_up_elsewhere_takes_the_best_model_along(config, whole, tmp_path, capsys):
    words = {**config, "output_dir": tmp_path / "other"}
    assert train_here(**words, resume_from_checkpoint=whole / "checkpoints/step-00000028") == 0
    assert "chosen anew" not in capsys.readouterr().out
    assert same_bits(whole / "best", tmp_path / "other/best")
    results = json.loads((tmp_path / "other/results.json").read_text())
    assert results["best/step"] == 20 and not list((tmp_path / "other").glob(".best*"))


def test_a_best_model_that_did_not_come_along_is_chosen_anew_and_it_is_said(
    config, without_best, tmp_path, capsys
):
    words = {**config, "output_dir": tmp_path / "other"}
    assert train_here(**words, resume_from_checkpoint=without_best / "checkpoints/step-00000028") == 0
    assert "best/ of update 20 is not in" in capsys.readouterr().out
    results = json.loads((tmp_path / "other/results.json").read_text())
    assert results["best/step"] == 30 and same_bits(tmp_path / "other/best", tmp_path / "other/final")


def test_a_finished_run_whose_best_did_not_come_along_is_weighed_as_it_ends(
    config, without_best, tmp_path, capsys
):
    assert train_here(**{**config, "output_dir": tmp_path / "new"}, resume_from_checkpoint=without_best) == 0
    assert "the best model was not found again, so best/ is the model of the last" in capsys.readouterr().out
    results = json.loads((tmp_path / "new/results.json").read_text())
    assert results["best/step"] == 30 and results["best/accuracy"] == results["eval/accuracy"]


def test_what_another_run_wrote_while_this_one_began_is_seen(config, whole, tmp_path, monkeypatch):
    """The folder is locked after the data is read: a run that was ending may have held it until then."""
    original, place = Run.start, cut_at(whole, 12, tmp_path / "cut")

    def start(self, *rest):
        shutil.copytree(whole / "checkpoints/step-00000028", place / "checkpoints/step-00000028")
        shutil.rmtree(place / "checkpoints/step-00000012")
        return original(self, *rest)

    monkeypatch.setattr(Run, "start", start)
    assert train_here(**{**config, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", place / "final")

    def write(self, *rest):
        shutil.copytree(whole, tmp_path / "late")
        return original(self, *rest)

    monkeypatch.setattr(Run, "start", write)
    with pytest.raises(UserError, match=r"late' already holds a run"):
        train_here(**{**config, "output_dir": tmp_path / "late"})
    assert without_timing(tmp_path / "late") == without_timing(whole)


def crash_at(monkeypatch, step):
    """Make the run end with an error in the update after `step`; metrics.jsonl has a row per update, and the
    checkpoints so far are on disk."""
    original = Run.count

    def count(self, *args):
        original(self, *args)
        if self.progress.step > step:
            self.saver.wait()
            raise RuntimeError("a crash on purpose")

    monkeypatch.setattr(Run, "count", count)


def scores(monkeypatch, *values):
    """Make the evaluations of a run return these accuracies, one after the other."""
    original, left = evaluate, list(values)

    def found(*args, **options):
        result = original(*args, **options)
        return replace(result, metrics={**result.metrics, "accuracy": left.pop(0)})

    monkeypatch.setattr("ft.run.evaluate", found)


@pytest.mark.parametrize("renames", [0, 1], ids=["after it", "in its writing"])
def test_a_best_that_came_after_the_checkpoint_does_not_stand_for_the_one_that_it_knows(
    config, tmp_path, monkeypatch, renames
):
    """The run resumes with more updates, and so on another trajectory, on which nothing is as good."""
    words = {**config, "eval_steps": 3, "max_train_steps": 12}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        scores(patch, 0.5, 0.9)
        crash_at(patch, 4)  # a checkpoint of update 4, which knows best/ of update 3
        train_here(**words)
    shutil.copytree(tmp_path / "run/best", tmp_path / "third")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        scores(patch, 0.9)
        crash_at(patch, 6)
        train_here(**words, resume_from_checkpoint="latest")
    assert not same_bits(tmp_path / "third", tmp_path / "run/best")
    if renames:
        shutil.rmtree(tmp_path / "run/best")
    scores(monkeypatch, *[0.4] * 9)
    assert train_here(**{**words, "max_train_steps": 15}, resume_from_checkpoint="latest") == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["best/step"], results["best/accuracy"]) == (3, 0.5)
    assert same_bits(tmp_path / "third", tmp_path / "run/best")
    assert not list((tmp_path / "run").glob(".best*"))


def test_a_best_that_no_checkpoint_knows_is_chosen_anew(config, whole, tmp_path, capsys):
    """The checkpoint of update 8 knows the best of update 5, which was removed long ago."""
    place = cut_at(whole, 8, tmp_path / "cut")
    assert train_here(**{**config, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert "best/ of update 5 is not in" in capsys.readouterr().out
    assert same_bits(whole / "best", place / "best")


def test_a_run_taken_up_before_its_last_checkpoints_leaves_their_trajectory(
    config, finished, tmp_path, capsys
):
    """What `latest` finds after another crash is on the new trajectory, although it is further behind."""
    other = cut_at(finished, 12, tmp_path / "other")  # the same, in a folder without later checkpoints
    folder = finished / "checkpoints"
    for name in ("step-00000030-backup", "step-00000028 (copy)", "step-30"):
        shutil.copytree(folder / "step-00000030", folder / name)
    words = {**config, "max_train_steps": 40, "save_total_limit": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        crash_at(patch, 13)
        train_here(**words, resume_from_checkpoint=folder / "step-00000012")
    said = capsys.readouterr().out
    assert "kept as superseded-step-00000030, superseded-step-00000028," in said
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert "step-00000012 after update 12" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert {"step-00000030-backup", "step-00000028 (copy)", "step-30", "superseded-step-00000030"} <= names
    assert train_here(**{**words, "output_dir": other}, resume_from_checkpoint="latest") == 0
    assert same_bits(finished / "final", other / "final") and same_bits(finished / "best", other / "best")
    assert without_timing(finished) == without_timing(other)


def test_a_checkpoint_of_another_folder_brings_no_rows_of_its_metrics(config, whole, tmp_path, capsys):
    place = whole / "checkpoints/step-00000012"
    words = {**config, "output_dir": tmp_path / "other", "resume_from_checkpoint": place}
    for said in ("", "are replaced: config.yaml, "):  # a second time over what the first has left
        assert train_here(**words, overwrite_output_dir="true") == 0
        assert without_timing(tmp_path / "other") == [r for r in without_timing(whole) if r["step"] > 12]
        out = capsys.readouterr().out
        assert said in out and ("are replaced" in out) == bool(said)


def test_a_start_with_another_run_s_checkpoint_that_died_early_is_started_again(config, whole, tmp_path):
    words = {**config, "output_dir": tmp_path / "other"}
    words |= {"resume_from_checkpoint": whole / "checkpoints/step-00000012"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        crash_at(patch, 13)
        train_here(**words)
    assert (tmp_path / "other/config.yaml").exists()
    assert train_here(**words) == 0
    assert same_bits(whole / "final", tmp_path / "other/final")


@pytest.mark.parametrize("name", ["step-00000030-backup", "superseded-step-00000030"])
def test_what_is_kept_beside_a_run_s_checkpoints_is_taken_up_elsewhere(config, finished, tmp_path, name):
    """It may be from another trajectory than the checkpoints, metrics and results there."""
    place = shutil.copytree(finished / "checkpoints/step-00000030", finished / "checkpoints" / name)
    words = {**config, "resume_from_checkpoint": place, "max_train_steps": 32}
    for more in ({}, {"overwrite_output_dir": "true"}):
        with pytest.raises(UserError, match=rf"{name}' is part of the run .* another output_dir"):
            train_here(**words, **more)
    assert (finished / "results.json").exists()
    assert train_here(**{**words, "output_dir": tmp_path / "other"}) == 0
    assert min(row["step"] for row in without_timing(tmp_path / "other")) > 30


def test_a_crash_while_best_is_replaced_does_not_lose_it(config, whole, tmp_path):
    """The old best/ was moved aside and the new one is not yet in place."""
    place = cut_at(whole, 28, tmp_path / "cut")
    (place / "best").rename(place / ".best.old")
    assert train_here(**{**config, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "best", place / "best")


@pytest.mark.parametrize("kept", [True, False])
def test_a_best_that_was_cut_short_stops_no_resume(config, whole, tmp_path, capsys, kept):
    """As by an unfinished copy of the run."""
    place = cut_at(whole, 28, tmp_path / "cut")
    if kept:
        shutil.copytree(place / "best", place / ".best.old")
    weights = place / "best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert train_here(**{**config, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert ("chosen anew" in capsys.readouterr().out) != kept
    assert same_bits(whole / "best", place / "best") == kept
    assert not list(place.glob(".best*"))


def test_an_older_folder_that_cannot_be_removed_is_in_nobodys_way(tmp_path, monkeypatch):
    """On NFS, a file that is being read keeps its folder from being removed."""
    stuck, remove = [], shutil.rmtree

    def rmtree(path, **options):
        if path.name not in stuck:
            remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for number in range(4):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/file").write_text(str(number))
        stuck[:] = [".best.old"] if number in (1, 2) else []
        durable.replace_folder(tmp_path / "new", tmp_path / "best")
        assert (tmp_path / "best/file").read_text() == str(number)
        assert (tmp_path / ".best.old").exists() == bool(stuck)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 7}, ("seed", "42", "7")),
        ({"global_batch_size": 16}, ("global_batch_size", "32", "16")),
        ({"learning_rate": 1e-4}, ("learning_rate", "0.003", "0.0001")),
        ({"warmup_ratio": 0.2}, ("warmup_ratio", "0.0", "0.2")),
        ({"weight_decay": 0.1}, ("weight_decay", "0.01", "0.1")),  # else it would come from the checkpoint
        ({"adam_beta2": 0.99}, ("adam_beta2", "0.999", "0.99")),
        ({"max_grad_norm": 0.5}, ("max_grad_norm", "1.0", "0.5")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor", "0.0", "0.1")),
        ({"dropout_mode": "torch"}, ("dropout_mode", "row_keyed", "torch")),
        (
            {"config_overrides": "hidden_dropout_prob=0"},
            ("config_overrides", "None", "hidden_dropout_prob=0"),
        ),
        # It has chosen what is in best/.
        ({"metric_for_best_model": "f1_macro"}, ("metric_for_best_model", "accuracy", "f1_macro")),
        ({"greater_is_better": "false"}, ("greater_is_better", "True", "False")),
        ({"max_train_samples": 100}, ("data",)),
        ({"config_overrides": "num_hidden_layers=1"}, ("config_overrides", "None", "num_hidden_layers=1")),
        ({"freeze": "embeddings"}, ("freeze", "None", "embeddings")),
        ({"ema_decay": 0.9}, ("ema_decay", "None", "0.9")),
        ({"lora_rank": 4}, ("lora_rank", "None", "4")),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(config, finished, change, names):
    with pytest.raises(UserError) as caught:
        train_here(**{**config, **change}, resume_from_checkpoint="latest")
    assert all(name in str(caught.value) for name in ("resume_from_checkpoint", *names))
    assert not (finished / ".lock").exists()


def test_a_refused_checkpoint_of_elsewhere_leaves_no_folder(config, whole, tmp_path):
    with pytest.raises(UserError, match="another seed"):
        train_here(**{**config, "seed": 7, "output_dir": tmp_path / "new"}, resume_from_checkpoint=whole)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("finished")
def test_a_checkpoint_of_another_pretrained_model_is_refused_wherever_it_lies(config, tmp_path):
    from safetensors.torch import load_file, save_file

    moved = shutil.copytree(config["model_name_or_path"], tmp_path / "moved")
    words = {**config, "resume_from_checkpoint": "latest", "model_name_or_path": moved}
    assert train_here(**words) == 0
    weights = load_file(moved / "model.safetensors")
    save_file(
        {k: v + 0.01 for k, v in weights.items()}, moved / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="was made with another pretrained model"):
        train_here(**words)


def test_a_finished_run_resumed_elsewhere_has_no_picture_to_draw(config, whole, tmp_path, capsys):
    assert (
        train_here(**{**config, "output_dir": tmp_path / "new"}, resume_from_checkpoint=whole, drawn=True)
        == 0
    )
    assert (tmp_path / "new/results.json").exists() and not (tmp_path / "new/training.png").exists()
    assert "training.png" not in capsys.readouterr().out


def test_what_may_change_may_change(config, whole, tmp_path):
    place = cut_at(whole, 12, tmp_path / "cut")
    changes = {"logging_steps": 5, "save_steps": 7, "eval_steps": 11, "per_device_train_batch_size": 8}
    assert train_here(**{**config, **changes, "output_dir": place}, resume_from_checkpoint="latest") == 0
    assert list(series(place, "eval/loss")) == [5, 10, 22, 30]
    assert list(series(place, "train/loss")) == [3, 6, 9, 12, 15, 20, 25, 30]
    saved = {path.name for path in (place / "checkpoints").glob("step-*")}
    assert saved == {f"step-{step:08d}" for step in (4, 8, 12, 14, 21, 28, 30)}
    assert weights_difference(whole / "final", place / "final", but=KEYS_BIAS) < 1e-4


def fail_to_write(monkeypatch, *steps):
    """Make the disk appear full for the checkpoints of some updates."""
    import safetensors.torch

    original = safetensors.torch.save_file

    def full(tensors, path, **options):
        if any(f"step-{step:08d}" in str(path) for step in steps):
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)


def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_run_goes_on(
    config, whole, tmp_path, monkeypatch, capfd
):
    fail_to_write(monkeypatch, 8)
    words = {**config, "output_dir": tmp_path / "full"}
    assert train_here(**words) == 0
    assert "warning: output_dir: the checkpoint of update 8 cannot be written" in capfd.readouterr().err
    kept = sorted(path.name for path in (tmp_path / "full/checkpoints").iterdir())
    assert "step-00000004" in kept and "step-00000008" not in kept and not [n for n in kept if "tmp" in n]
    assert same_bits(whole / "final", tmp_path / "full/final")


@pytest.fixture
def no_garbage_collector():
    """What is kept alive by a reference cycle stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collector")  # a failed run must release its folder without it
def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_earlier_checkpoint_usable(
    config, whole, tmp_path, monkeypatch
):
    words = {**config, "output_dir": tmp_path / "full"}
    fail_to_write(monkeypatch, 8, 12, 16, 20, 24, 28, 30)
    before = threading.enumerate()
    with pytest.raises(UserError, match=r"3 checkpoints in a row failed.*No space left"):
        train_here(**words)
    for thread in set(threading.enumerate()) - set(before):
        if thread.name == "watchdog":  # it would end this process, half an hour later
            thread.join(timeout=10)
            assert not thread.is_alive()
    assert [p.name for p in (tmp_path / "full/checkpoints").glob("step*")] == ["step-00000004"]
    monkeypatch.undo()
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", tmp_path / "full/final")


def test_a_model_that_cannot_be_written_leaves_nothing_half(config, tmp_path, monkeypatch):
    import safetensors.torch

    original, exports = safetensors.torch.save_file, []

    def full(tensors, path, **options):
        original(tensors, path, **options)
        exports.append(path)
        if ".best.tmp" in str(path) and len([p for p in exports if ".best.tmp" in str(p)]) > 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError, match=r"output_dir: .*best' cannot be written: .*No space left.*latest"):
        train_here(**config)
    assert (tmp_path / "run/best/model.safetensors").exists()
    assert not list((tmp_path / "run").glob(".best.tmp*"))
    monkeypatch.undo()
    assert train_here(**config, resume_from_checkpoint="latest") == 0


def test_a_run_that_stopped_early_does_not_go_on_when_it_is_resumed(config, tmp_path):
    words = {**config, "learning_rate": 1e-12, "early_stopping_patience": 2}
    assert train_here(**words) == 0
    before = without_timing(tmp_path / "run")
    assert before[-1]["step"] == 15
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert without_timing(tmp_path / "run") == before


def test_a_finished_run_without_a_checkpoint_is_not_wiped_by_latest(config, tmp_path):
    words = {**config, "max_train_steps": 2, "save_strategy": "no"}
    assert train_here(**words) == 0
    with pytest.raises(UserError, match="finished and has no checkpoint"):
        train_here(**words, resume_from_checkpoint="latest")
    assert (tmp_path / "run/best/model.safetensors").exists()


def test_a_run_without_checkpoints_that_was_stopped_and_finished_is_not_trained_again(
    config, tmp_path, monkeypatch
):
    """One command for a job that restarts: it must not begin again at the checkpoint of the stop."""
    words = {**config, "max_train_steps": 12, "save_strategy": "no", "resume_from_checkpoint": "latest"}
    assert train_here(**words, max_time="1s") == EXIT_STOPPED
    made = []
    count = Run.count
    monkeypatch.setattr(Run, "count", lambda run, *update: (made.append(1), count(run, *update)))
    assert train_here(**words) == 0
    rows, results = without_timing(tmp_path / "run"), results_in(tmp_path / "run")
    assert len(made) == 11 and results["train/total_steps"] == 12
    assert train_here(**words) == 0
    assert len(made) == 11
    assert without_timing(tmp_path / "run") == rows and results_in(tmp_path / "run") == results


def test_a_run_that_is_resumed_from_elsewhere_without_checkpoints_leaves_none(config, whole, tmp_path):
    words = {**config, "save_strategy": "no", "output_dir": tmp_path / "new"}
    words["resume_from_checkpoint"] = whole / "checkpoints/step-00000028"
    assert train_here(**words) == 0
    assert not list((tmp_path / "new").glob("checkpoints/*"))


def test_a_launcher_that_starts_a_run_again_does_not_take_it_back_to_where_it_began(
    config, whole, tmp_path, monkeypatch
):
    begun = shutil.copytree(
        cut_at(whole, 12, tmp_path / "cut") / "checkpoints/step-00000012", tmp_path / "from"
    )
    words = {**config, "output_dir": tmp_path / "new", "resume_from_checkpoint": begun, "max_train_steps": 30}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    older = shutil.copytree(whole, tmp_path / "new") / "checkpoints/step-00000030/manifest.json"
    os.utime(older, (1, 1))  # of another run, before the launch
    assert train_here(**words, overwrite_output_dir="true") == 0  # nothing has been saved since
    before = (tmp_path / "new/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"had reached .*step-.* --resume_from_checkpoint latest"):
        train_here(**words, overwrite_output_dir="true")
    assert (tmp_path / "new/metrics.jsonl").read_bytes() == before
    assert train_here(**{**words, "resume_from_checkpoint": "latest"}) == 0


@pytest.mark.usefixtures("finished")
def test_it_is_said_that_a_resumed_run_overwrites_nothing(config, capsys):
    words = {**config, "resume_from_checkpoint": "latest"}
    assert train_here(**words, overwrite_output_dir="true") == 0
    assert "warning: overwrite_output_dir: nothing is overwritten" in capsys.readouterr().out
    assert train_here(**words) == 0
    assert "overwrite_output_dir" not in capsys.readouterr().out


def test_a_mistake_found_later_costs_the_old_run_nothing(config, finished):
    with pytest.raises(UserError, match="text_column_names"):
        train_here(**config, overwrite_output_dir="true", text_column_names="nowhere")
    assert (finished / "results.json").exists() and (finished / "checkpoints/latest").exists()


def test_a_finished_run_that_goes_on_is_none_until_its_new_end(config, finished, capsys):
    longer = {**config, "resume_from_checkpoint": "latest", "max_train_steps": 40}
    assert train_here(**longer, max_time="1s") == EXIT_STOPPED
    assert not (finished / "results.json").exists() and not (finished / "report.html").exists()
    capsys.readouterr()
    assert train_here(**longer) == 0
    assert "the run has 40 updates instead of 30" in capsys.readouterr().out
    assert json.loads((finished / "results.json").read_text())["train/earlier_totals"] == [[30, 30]]
    assert train_here(**{**longer, "max_train_steps": 41}) == 0
    said = capsys.readouterr().out
    assert "40 updates instead of 30, which sets its learning rates from update 30 on" in said
    assert "41 updates instead of 40, which sets its learning rates from update 40 on" in said


def test_a_run_that_is_shortened_to_where_it_stands_weighs_its_last_update(config, whole, tmp_path, capsys):
    cut_at(whole, 12, config["output_dir"])  # evaluated after 5 and 10
    assert train_here(**{**config, "max_train_steps": 12}, resume_from_checkpoint="latest") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert list(scored) == [5, 10, 12]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/accuracy"] == max(scored.values())
    capsys.readouterr()
    assert train_here(**config, resume_from_checkpoint="latest") == 0  # back to its original length
    assert "chosen anew" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/accuracy"] == max(row.get("eval/accuracy", 0) for row in rows)
    assert "train/earlier_totals" not in results  # it is the same as without the change


def test_an_evaluation_that_ends_a_run_is_saved_where_it_is_made_again(config, tmp_path):
    """The run was stopped in it, before it had exhausted the patience."""
    words = {**config, "learning_rate": 1e-12, "early_stopping_patience": 2}
    assert train_here(**words) == 0
    place = tmp_path / "run/checkpoints/step-00000015"
    with rewritten(place) as about:
        about["progress"] |= {"evaluation_due": True, "evaluated_step": 10, "evaluations_without_gain": 1}
    (tmp_path / "run/results.json").unlink()
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    progress = checkpoint.read_state(place)["progress"]
    assert (progress["evaluation_due"], progress["evaluations_without_gain"]) == (False, 2)


@contextmanager
def rewritten(place):
    """The content of a checkpoint's state.json, to be changed."""
    about = json.loads((place / "state.json").read_text())
    yield about
    (place / "state.json").write_text(json.dumps(about))
    (place / "manifest.json").unlink()
    durable.write_manifest(place)


@pytest.mark.parametrize("freeze", [None, "embeddings"])
def test_an_older_checkpoint_of_whole_tables_is_refused_where_they_were_trained(config, freeze):
    words = {**config, "max_train_steps": 4} | ({"freeze": freeze} if freeze else {})
    assert train_here(**words) == 0
    with rewritten(config["output_dir"] / "checkpoints/step-00000004") as about:
        del about["identity"]["choice of word embeddings"]
    if freeze:
        assert train_here(**words, resume_from_checkpoint="latest") == 0
        return
    with pytest.raises(UserError, match="an earlier version, which trained all word embeddings"):
        train_here(**words, resume_from_checkpoint="latest")


def test_an_older_checkpoint_does_not_say_what_was_evaluated_and_is_not_evaluated_again(config, finished):
    place = finished / "checkpoints/step-00000030"
    with rewritten(place) as about:
        for name in ("evaluated_step", "precision", "total_seconds", "earlier_totals"):
            del about["progress"][name]
    before = (finished / "metrics.jsonl").read_text()
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert (finished / "metrics.jsonl").read_text() == before


def test_another_precision_than_before_is_said(config, whole, tmp_path, monkeypatch, capsys):
    cut_at(whole, 28, config["output_dir"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert "WARNING mixed precision: it was fp32 up to here, and is bf16" in capsys.readouterr().out


def test_seconds_in_all_are_those_of_all_starts(config, whole, tmp_path):
    cut_at(whole, 28, config["output_dir"])
    place = tmp_path / "run/checkpoints/step-00000028"
    with rewritten(place) as about:
        about["progress"]["total_seconds"] = 1000.0
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["perf/total_seconds"] > 1000
