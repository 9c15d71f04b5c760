"""What a run does to its folder: nothing of a run is lost by a restart, another run, or a full disk."""

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import metrics_of, train_here

from ft.checkpoint import FILES, is_own
from ft.config import Config
from ft.durable import write_manifest
from ft.errors import UserError
from ft.options import RunOptions
from ft.output import check_output_dir, check_seeds_dir, write_whole


@pytest.fixture
def words(base_flags):
    return {**base_flags, "max_train_steps": 6, "save_strategy": "steps", "save_steps": 3}


def test_a_launcher_does_not_replace_what_its_own_run_has_made(words, tmp_path, monkeypatch):
    """`--max_restarts` with `--overwrite_output_dir`: the second attempt would start from scratch."""
    anew = {"overwrite_output_dir": "true"}
    assert train_here(**words, **anew) == 0
    seeds = {**words, "output_dir": tmp_path / "seeds", "num_seeds": 2}
    assert train_here(**seeds, **anew) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for run, place in ((words, "run/checkpoints/step-00000006"), (seeds, "seeds/seed-42")):
        with pytest.raises(UserError, match=f"had reached .*{place}.*--resume_from_checkpoint latest"):
            train_here(**run, **anew)
        assert (tmp_path / place).exists()
    assert train_here(**words, resume_from_checkpoint="latest") == 0


def test_damaged_checkpoints_that_are_said_to_be_kept_are_kept(words, tmp_path, capsys):
    assert train_here(**words) == 0
    for path in (tmp_path / "run/checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"")
    assert train_here(**words, overwrite_output_dir="true", resume_from_checkpoint="latest") == 0
    assert "kept as damaged-step-00000006" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/damaged-step-00000006/manifest.json").exists()


def test_a_run_that_begins_with_another_s_checkpoint_replaces_none_unless_told_to(words, tmp_path, capsys):
    assert train_here(**words) == 0
    assert train_here(**{**words, "output_dir": tmp_path / "other", "seed": 7}) == 0
    (tmp_path / "other/wandb_id").write_text("of the other")
    start = shutil.copytree(tmp_path / "run/checkpoints/step-00000003", tmp_path / "from")
    resumed = {**words, "output_dir": tmp_path / "other", "resume_from_checkpoint": start}
    with pytest.raises(UserError, match="other' already holds a run"):
        train_here(**resumed)
    assert (tmp_path / "other/wandb_id").exists() and (tmp_path / "other/results.json").exists()
    capsys.readouterr()
    # Stopped at once: what is then there is from this run, or was set aside.
    assert train_here(**resumed, max_time="1s", overwrite_output_dir="true") == 75
    assert "files of another run in" in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "other").iterdir() if not path.name.startswith(".")}
    assert not left & {"wandb_id", "results.json", "final"}
    assert {"config.yaml", "checkpoints"} <= left
    assert [row["step"] for row in metrics_of(tmp_path / "other") if "train/loss" in row][:1] == [4]


def test_a_training_that_is_done_is_scored_though_none_of_its_checkpoints_was_written(
    words, tmp_path, monkeypatch, capfd
):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("ft.saver.write_checkpoint", full)
    assert train_here(**{**words, "save_steps": 2}) == 0
    assert full.call_count == 3 and "checkpoint of update 6" in capfd.readouterr().err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["train/total_steps"] == 6 and "test/accuracy" in results


def made(place):
    """A folder that passes for a complete checkpoint."""
    place.mkdir(parents=True)
    for name in FILES:
        (place / name).write_text("")
    write_manifest(place)
    return place


@pytest.mark.parametrize("left", ["checkpoints/step-00000003", "results.json", "final"])
def test_what_a_run_has_come_to_is_not_replaced_by_one_from_elsewhere(left, tmp_path):
    """An unfinished run has checkpoints; a finished one may have none."""
    made(tmp_path / "run" / left)
    (tmp_path / "run/metrics.jsonl").write_text("")
    start = made(tmp_path / "from")
    options = RunOptions(output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(start))
    with pytest.raises(UserError, match="run' already holds a run"):
        check_output_dir(options)
    shutil.rmtree(tmp_path / "run" / left)
    assert check_output_dir(options) == (start, [])  # what was only begun


def test_a_checkpoint_on_another_disk_is_the_run_s_own(tmp_path):
    place, link = made(tmp_path / "disk/three"), tmp_path / "run/checkpoints/step-00000003"
    link.parent.mkdir(parents=True)
    link.symlink_to(place)
    alias = tmp_path / "best"
    alias.symlink_to(link)
    for name in ("latest", link, alias, place):
        options = RunOptions(output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(name))
        assert check_output_dir(options) == (link, [])
    assert is_own(link, link.parent) and not is_own(place, link.parent)


@pytest.mark.parametrize("name", ["checkpoints/superseded-step-00000003", "seed-7/checkpoints/step-00000003"])
@pytest.mark.parametrize("linked", ["nothing", "the folder around it", "it"])
def test_what_would_be_replaced_is_not_taken_up_in_its_own_folder(name, linked, tmp_path):
    """Even if it is on another disk."""
    start = made(tmp_path / "run" / name)
    (tmp_path / "run" / "seeds.json").write_text('{"7": null}')
    link = {"it": start, "the folder around it": tmp_path / "run" / name.split("/")[0]}.get(linked)
    if link:
        shutil.move(link, tmp_path / "disk")
        link.symlink_to(tmp_path / "disk")
    options = {"resume_from_checkpoint": str(start), "overwrite_output_dir": True}
    with pytest.raises(UserError, match=r"is part of the run in .*, but not one of its checkpoints"):
        check_output_dir(RunOptions(output_dir=str(tmp_path / "run"), **options))
    assert check_output_dir(RunOptions(output_dir=str(tmp_path), **options)) == (start, [])


@pytest.mark.parametrize(
    "key, name",
    [
        ("model_name_or_path", "best"), ("tokenizer_name", "best"), ("train_file", "best/rows.csv"),
        ("dataset_name", "evaluation-test"),
    ],
)  # fmt: skip
def test_a_run_does_not_replace_what_it_reads(key, name, tmp_path):
    """Its model would be gone if it ended early, and it could not be resumed."""
    run = tmp_path / "run"
    for folder in ("best", "evaluation-test", "mine"):
        (run / folder).mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    given = {"output_dir": str(run), "overwrite_output_dir": True, "train_file": "t.csv"}
    with pytest.raises(UserError, match=rf"{key}: .*{name}' is part of the run in .*, which"):
        check_output_dir(Config(**given | {key: str(run / name)}))
    assert check_output_dir(Config(**given | {key: str(run / "mine")})) == (None, [])  # it stays
    elsewhere = given | {key: str(run / name), "output_dir": str(tmp_path / "other")}
    assert check_output_dir(Config(**elsewhere)) == (None, [])


@pytest.mark.parametrize("name", ["config.yaml", "wandb", "best", "report.html", "checkpoints"])
def test_what_no_run_has_left_is_not_replaced(name, tmp_path):
    """A hand-written config in the folder of the run to come; W&B's folder of other runs."""
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("mine")
    for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        options = Config(output_dir=str(run), num_seeds=2, **more)
        for check in (check_output_dir, check_seeds_dir):
            with pytest.raises(UserError, match=rf"run' holds {name}, which no run wrote and this one"):
                check(options)
    (run / name).unlink()
    (run / name).mkdir()
    (run / name / "epoch=1.ckpt").write_text("mine")
    with pytest.raises(UserError, match=rf"run' holds {name}, which no run wrote and this one"):
        check_output_dir(Config(output_dir=str(run), overwrite_output_dir=True))
    (run / "environment.json").write_text("{}")  # of a run
    with pytest.raises(UserError, match="run' already holds a run"):
        check_output_dir(RunOptions(output_dir=str(run)))
    assert check_output_dir(RunOptions(output_dir=str(run), overwrite_output_dir=True)) == (None, [])
    assert check_output_dir(RunOptions(output_dir=str(run), resume_from_checkpoint="latest")) == (None, [])
    assert (run / name / "epoch=1.ckpt").read_text() == "mine"


def test_checkpoints_make_a_folder_that_of_a_run(tmp_path):
    """Such as a checkpoint and a best/ that were copied to begin with."""
    run = tmp_path / "run"
    for folder in ("checkpoints/step-00000500", "best"):
        (run / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="run' already holds a run"):
        check_output_dir(RunOptions(output_dir=str(run)))
    found, warnings = check_output_dir(RunOptions(output_dir=str(run), resume_from_checkpoint="latest"))
    assert found is None and "kept as damaged-step-00000500" in warnings[0]


def test_a_run_that_died_before_its_first_checkpoint_goes_on_as_the_same_run_of_wandb(words, tmp_path):
    assert train_here(**words) == 0
    (tmp_path / "run/wandb_id").write_text("abcd 0\n")
    shutil.rmtree(tmp_path / "run/checkpoints")
    for name in ("results.json", "final"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert (tmp_path / "run/wandb_id").exists()
    assert train_here(**words, overwrite_output_dir="true") == 0
    assert not (tmp_path / "run/wandb_id").exists()


def test_a_run_that_is_replaced_loses_its_links_and_not_what_they_lead_to(words, tmp_path):
    assert train_here(**words) == 0
    shutil.move(tmp_path / "run/checkpoints", tmp_path / "disk")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    before = sorted(path.name for path in (tmp_path / "disk").iterdir())
    assert "step-00000006" in before
    assert train_here(**{**words, "seed": 7}, overwrite_output_dir=True) == 0
    assert not (tmp_path / "run/checkpoints").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == before


def test_a_run_of_its_own_that_is_called_as_one_of_several_seeds_stays(words, tmp_path):
    own = {**words, "output_dir": tmp_path / "run/seed-7", "seed": 7}
    assert train_here(**own) == 0
    before = (tmp_path / "run/seed-7/results.json").read_bytes()
    assert train_here(**words) == 0
    assert train_here(**words, overwrite_output_dir=True) == 0
    assert train_here(**words, overwrite_output_dir=True, num_seeds=2) == 0  # seeds 42 and 43
    assert train_here(**words, overwrite_output_dir=True, num_seeds=2) == 0
    assert train_here(**words, overwrite_output_dir=True) == 0
    assert not list((tmp_path / "run").glob("seed-4*"))
    assert (tmp_path / "run/seed-7/results.json").read_bytes() == before
    with pytest.raises(UserError, match=r"already holds a run \(seed-7\)"):
        train_here(**{**words, "seed": 6, "num_seeds": 2, "output_dir": only(tmp_path, "run/seed-7")})


def only(tmp_path, name):
    """A folder with only a copy of this run."""
    shutil.copytree(tmp_path / name, tmp_path / "only" / Path(name).name)
    return tmp_path / "only"


def test_a_model_that_the_disk_does_not_take_is_one_message(words, monkeypatch):
    monkeypatch.setattr("ft.model.replace_folder", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match=r"No space left\. Make room, .*latest \(without a checkpoint, that"):
        train_here(**{**words, "save_strategy": "no", "eval_strategy": "no"})


def test_a_tokenizer_that_the_disk_does_not_take_is_one_message(words, tmp_path, monkeypatch):
    """For a fast one, Rust raises an error without a type of its own."""
    full = Mock(side_effect=Exception("No space left on device (os error 28)"))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(UserError, match=r"No space left on device \(os error 28\)\. Make room, "):
        train_here(**{**words, "save_strategy": "no", "eval_strategy": "no"})
    assert not list(Path(words["output_dir"]).glob(".*.tmp"))


def test_a_file_that_the_disk_does_not_take_is_one_message(tmp_path, monkeypatch):
    write_whole(tmp_path / "results.json", "whole")
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match=r"output_dir: .*results\.json' cannot be written: No space left"):
        write_whole(tmp_path / "results.json", "half")
    assert (tmp_path / "results.json").read_bytes() == b"whole"


def test_an_evaluation_of_the_model_that_is_replaced_goes_with_it(words, tmp_path):
    assert train_here(**words) == 0
    for name in ("evaluation-test", "compared-validation", "evaluation-of-mine"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "results.json").write_text("{}")
    assert train_here(**words, overwrite_output_dir="true") == 0
    left = {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(("eval", "comp"))}
    assert left == {"evaluation-of-mine"}
