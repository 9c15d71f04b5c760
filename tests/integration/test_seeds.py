"""Several seeds in one run: each is bit-identical to the run of that seed alone, and together they resume
where they were interrupted."""

import errno
import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from compare import assert_same, same_bits, without_timing
from conftest import FORK, FORKS, flags, launch, train_here, wait_for

from ft import seeds
from ft.cli import parse
from ft.config import Config
from ft.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, UserError


@pytest.fixture
def three(base_flags):
    return {**base_flags, "num_seeds": 3, "seed": 7, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """Three seeds, in one process, without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    values = {"model_name_or_path": tiny_model, "dataset_name": reviews, "num_train_epochs": 2}
    values |= {"learning_rate": 3e-3, "logging_steps": 1, "num_seeds": 3, "seed": 7, "output_dir": folder}
    assert train_here(**values) == EXIT_DONE
    return folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def same_runs(one, other, names=("seed-7", "seed-8", "seed-9")):
    for name in names:
        assert same_bits(one / name / "best", other / name / "best")
        assert same_bits(one / name / "final", other / name / "final")
        assert without_timing(one / name) == without_timing(other / name)
    return True


def same_results(one, other):
    """All results except timings."""
    a, b = (results_of(folder) for folder in (one, other))
    for found in (a, b):
        for run in found["runs"].values():
            for key in [key for key in run if key.startswith("perf/")]:
                del run[key]
    return a == b


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_each_run_is_that_of_its_seed_alone_to_the_bit(whole, three, tmp_path, seed):
    del three["num_seeds"]
    alone = tmp_path / f"seed-{seed}"
    assert train_here(**{**three, "seed": seed, "output_dir": alone}) == EXIT_DONE
    assert same_runs(whole, tmp_path, [alone.name])
    others = {7, 8, 9} - {seed}
    assert not any(same_bits(alone / "final", whole / f"seed-{other}" / "final") for other in others)


def test_with_torchs_own_dropout_too(three, tmp_path):
    """Its generator is the process's, which the previous run used."""
    three |= {"dropout_mode": "torch", "num_seeds": 2}
    assert train_here(**three) == EXIT_DONE
    del three["num_seeds"]
    assert train_here(**{**three, "seed": 8, "output_dir": tmp_path / "seed-8"}) == EXIT_DONE
    assert same_runs(tmp_path / "run", tmp_path, ["seed-8"])


def test_mean_deviation_and_each_run(whole):
    results = results_of(whole)
    assert results["seeds"] == [7, 8, 9] and list(results["runs"]) == ["seed-7", "seed-8", "seed-9"]
    for key in ("test/accuracy", "eval/f1_macro", "test/loss", "best/accuracy"):
        values = [results_of(whole / f"seed-{seed}")[key] for seed in (7, 8, 9)]
        assert results[key] == pytest.approx(statistics.fmean(values))
        assert results[f"{key}_std"] == pytest.approx(statistics.stdev(values))
        assert [run[key] for run in results["runs"].values()] == values
    assert len({run["test/loss"] for run in results["runs"].values()}) == 3
    assert "perf/train_seconds" not in results and "test/rows" not in results


def test_the_table_shows_each_run_its_mean_and_its_deviation(whole):
    shown = seeds.table(results_of(whole)).splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["seed-7", "seed-8", "seed-9", "mean", "std"]
    assert "test/loss" in shown[0] and f"{results_of(whole)['test/loss']:.4f}" in shown[-2]


def test_a_metric_that_one_run_does_not_define_is_said():
    """A correlation, of a model that always says the same."""
    runs = {
        f"seed-{seed}": {"headline": ["spearmanr"], "test/spearmanr": value, "test/loss": 1.0}
        for seed, value in ((7, None), (8, 0.5))
    }
    results = {"seeds": [7, 8], "test/loss": 1.0, "test/loss_std": 0.0, "runs": runs}
    assert [line.split() for line in seeds.table(results).splitlines()] == [
        ["test/spearmanr", "test/loss"], ["seed-7", "not", "defined", "1.0000"],
        ["seed-8", "0.5000", "1.0000"], ["mean", "1.0000"], ["std", "0.0000"],
    ]  # fmt: skip


def test_seeds_that_nothing_scored_end_with_a_word(three, reviews, tmp_path, capsys):
    del three["dataset_name"]
    three |= {"train_file": reviews / "train.csv", "num_seeds": 2, "max_train_steps": 1}
    assert train_here(**three, eval_strategy="no") == EXIT_DONE
    assert "no rows were scored" in capsys.readouterr().out
    assert results_of(tmp_path / "run")["seeds"] == [7, 8]


def test_what_is_left_in_the_folder(whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        "config.yaml", "results.json", "seed-7", "seed-8", "seed-9", "seeds.json",
    ]  # fmt: skip
    config = parse(Config, [str(whole / "config.yaml")])
    assert (config.num_seeds, config.seed, config.overwrite_output_dir) == (3, 7, False)
    alone = parse(Config, [str(whole / "seed-8" / "config.yaml")])
    assert (alone.num_seeds, alone.seed, alone.run_name) == (1, 8, "run-seed-8")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_cut_in_its_second_seed_it_goes_on_there(whole, three, started, tmp_path, how):
    often = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 50}  # keeps all until seen
    words = flags(**three, **often, resume_from_checkpoint="latest")
    process = started(FORK, words)
    wait_for(tmp_path / "run/seed-8/checkpoints/step-00000004/manifest.json", process)
    process.send_signal(how)
    process.communicate(timeout=120)
    assert process.returncode == (EXIT_STOPPED if how == signal.SIGTERM else -signal.SIGKILL)
    before = (tmp_path / "run/seed-7/final/model.safetensors").stat().st_mtime_ns
    done = launch(FORK, words)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "seed 7 (1 of 3): finished before" in done.stdout and "resumed from" in done.stdout
    assert (tmp_path / "run/seed-7/final/model.safetensors").stat().st_mtime_ns == before
    assert same_runs(whole, tmp_path / "run") and same_results(whole, tmp_path / "run")


def test_two_processes_train_every_seed_together(whole, three, tmp_path):
    done = launch(FORKS, flags(**three))
    assert done.returncode == EXIT_DONE, done.stderr
    for name in ("seed-7", "seed-8", "seed-9"):
        assert_same(whole / name, tmp_path / "run" / name)
    assert results_of(tmp_path / "run")["test/loss"] == pytest.approx(
        results_of(whole)["test/loss"], rel=1e-5
    )
    assert done.stdout.count("seed 8 (2 of 3)") == 1


def test_a_signal_between_two_seeds_ends_it_there(whole, three, tmp_path, capsys):
    import train

    real = train.train

    def train_and_be_told(config):
        code = real(config)
        if config.num_seeds == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the run no longer checks for it
        return code

    try:
        train.train = train_and_be_told
        assert train_here(**three) == EXIT_STOPPED
    finally:
        train.train = real
    assert "stopped between two seeds (SIGTERM)" in capsys.readouterr().out
    assert not (tmp_path / "run/seed-8").exists()
    assert train_here(**three, resume_from_checkpoint="latest") == EXIT_DONE
    assert same_runs(whole, tmp_path / "run") and same_results(whole, tmp_path / "run")


def test_max_time_is_for_all_seeds_together(three, tmp_path, monkeypatch, capsys):
    import train

    real = train.train

    def train_for_long(config):
        code = real(config)
        if config.num_seeds == 1:
            monkeypatch.setattr("ft.seeds.STARTED", time.monotonic() - 4000)
        return code

    monkeypatch.setattr(train, "train", train_for_long)
    assert train_here(**three, max_time="1h") == EXIT_STOPPED
    assert "stopped between two seeds (max_time)" in capsys.readouterr().out
    assert (tmp_path / "run/seed-7/results.json").exists() and not (tmp_path / "run/seed-8").exists()


def test_more_seeds_can_be_asked_for_later(whole, three, tmp_path, capsys):
    assert train_here(**{**three, "num_seeds": 2}) == EXIT_DONE
    assert train_here(**three, resume_from_checkpoint="latest") == EXIT_DONE
    assert capsys.readouterr().out.count("finished before") == 2
    assert same_runs(whole, tmp_path / "run") and same_results(whole, tmp_path / "run")


def test_a_finished_seed_whose_results_are_gone_writes_them_again(whole, three, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "seed-8" / "results.json").unlink()
    words = {**three, "num_train_epochs": 2, "logging_steps": 1, "output_dir": tmp_path / "run"}
    assert train_here(**words, resume_from_checkpoint="latest") == EXIT_DONE
    assert same_results(whole, tmp_path / "run") and same_runs(whole, tmp_path / "run")


def test_finished_seeds_are_skipped_on_another_number_of_processes(three, tmp_path):
    """On which another bound on micro-batches follows from the steps of accumulation."""
    words = {**three, "num_seeds": 2, "num_train_epochs": 1, "global_batch_size": 32}
    words |= {"gradient_accumulation_steps": 4, "output_dir": tmp_path / "run"}
    assert train_here(**words) == EXIT_DONE
    done = launch(FORKS, flags(**words, resume_from_checkpoint="latest"))
    assert done.returncode == EXIT_DONE and done.stdout.count("finished before") == 2, done.stderr


def test_seeds_that_were_jobs_of_their_own_are_taken_together(whole, three, tmp_path, capsys):
    """The names of their folders alone say that they belong together."""
    for seed in (7, 8, 9):
        shutil.copytree(whole / f"seed-{seed}", tmp_path / f"run/seed-{seed}")
    assert train_here(**three, resume_from_checkpoint="latest") == EXIT_DONE
    assert "finished before" not in capsys.readouterr().out  # each is scored again
    assert same_results(whole, tmp_path / "run") and same_runs(whole, tmp_path / "run")


def test_more_updates_can_be_asked_for_later(three, tmp_path, capsys):
    three |= {"num_seeds": 2, "lr_scheduler_type": "constant", "save_strategy": "epoch"}
    assert train_here(**{**three, "num_train_epochs": 1}) == EXIT_DONE
    assert train_here(**three, resume_from_checkpoint="latest") == EXIT_DONE
    assert "finished before" not in capsys.readouterr().out
    assert all(run["train/total_steps"] == 14 for run in results_of(tmp_path / "run")["runs"].values())


# --- the folder


TWO = {"num_seeds": 2, "max_train_steps": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_model, reviews):
    """A folder with two finished seeds of two updates."""
    folder = tmp_path_factory.mktemp("both") / "run"
    values = {"model_name_or_path": tiny_model, "dataset_name": reviews, "learning_rate": 3e-3, "seed": 7}
    assert train_here(**values, **TWO, num_train_epochs=2, logging_steps=1, output_dir=folder) == EXIT_DONE
    return folder


@pytest.fixture
def two_seeds(both, three):
    """A copy of it in the output folder of the given flags."""
    shutil.copytree(both, three["output_dir"])
    return three | TWO


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {},
            r"already holds a run .*--resume_from_checkpoint latest, replace it with --overwrite_output_dir",
        ),
        ({"num_seeds": 1}, r"holds the runs of several seeds \(.*seed-7.*\). Resume them with --num_seeds"),
        ({"num_seeds": 1, "resume_from_checkpoint": "latest"}, r"holds the runs of several seeds"),
    ],
)
def test_runs_of_seeds_are_not_written_over_by_mistake(two_seeds, tmp_path, more, message):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    with pytest.raises(UserError, match=message):
        train_here(**{**two_seeds, **more})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == before
    assert (tmp_path / "run" / "results.json").exists()


def test_the_folder_of_one_run_is_not_taken_for_several(base_flags, tmp_path):
    base_flags |= {"max_train_steps": 2}
    assert train_here(**base_flags) == EXIT_DONE
    with pytest.raises(UserError, match="holds the run of one seed, but num_seeds is 2"):
        train_here(**base_flags, num_seeds=2, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="already holds a run"):
        train_here(**base_flags, num_seeds=2)
    assert train_here(**base_flags, num_seeds=2, overwrite_output_dir=True) == EXIT_DONE
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "best").exists()
    assert train_here(**base_flags, overwrite_output_dir=True) == EXIT_DONE  # and back
    assert not list((tmp_path / "run").glob("seed*"))


def test_a_replaced_run_comes_back_if_the_new_one_cannot_begin(two_seeds, tmp_path):
    folder = tmp_path / "run"
    before = results_of(folder)
    wrong = {**two_seeds, "label_column_name": "lable", "overwrite_output_dir": True}
    with pytest.raises(UserError, match="label_column_name"):
        train_here(**wrong)
    assert results_of(folder) == before and (folder / "seed-8" / "best").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert train_here(**{**two_seeds, "seed": 8, "overwrite_output_dir": True}) == EXIT_DONE
    assert sorted(path.name for path in folder.glob("seed-*")) == ["seed-8", "seed-9"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_full_at_the_record_gives_back_what_it_had_replaced(two_seeds, tmp_path, monkeypatch):
    before = results_of(tmp_path / "run")
    full = Mock(side_effect=UserError("No space left"))
    monkeypatch.setattr("ft.seeds.write_whole", full)
    with pytest.raises(UserError, match="No space left"):
        train_here(**two_seeds, overwrite_output_dir=True)
    assert results_of(tmp_path / "run") == before and (tmp_path / "run/seed-8/best").exists()


def test_what_cannot_be_moved_out_of_the_way_leaves_the_rest_as_it_was(two_seeds, tmp_path, monkeypatch):
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*"))
    real = Path.replace

    def replace(path, target):
        if path.name == "seed-8" and ".replaced" in str(target):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match=r"seed-8' cannot be written: .*Permission denied"):
        train_here(**two_seeds, overwrite_output_dir=True)
    assert sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*")) == before


def test_the_record_stays_with_the_seeds_that_were_cut(two_seeds, tmp_path):
    record = tmp_path / "run/seeds.json"
    record.write_text('{"7": null, "8": null}')
    other = {**two_seeds, "seed": 20, "resume_from_checkpoint": "latest", "label_column_name": "lable"}
    with pytest.raises(UserError, match="label_column_name"):
        train_here(**other)
    assert {"7", "8"} <= json.loads(record.read_text()).keys()


def test_a_start_that_was_killed_before_its_first_run_is_not_in_the_way(two_seeds, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/seeds.json").write_text('{"7": null, "8": null}')
    assert train_here(**{**two_seeds, "output_dir": tmp_path / "other"}) == EXIT_DONE


def test_what_a_killed_start_had_replaced_is_not_in_the_way(two_seeds, tmp_path):
    """Killed in its second seed, it leaves what it replaced beside what it had started."""
    folder = tmp_path / "run"
    shutil.copytree(folder / "seed-7", folder / ".replaced" / "seed-7")
    assert train_here(**two_seeds, overwrite_output_dir=True) == EXIT_DONE
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_mistake_in_the_data_leaves_nothing_in_the_way(three, tmp_path):
    with pytest.raises(UserError, match="label_column_name"):
        train_here(**three, label_column_name="lable")
    assert train_here(**{**three, "max_train_steps": 1, "num_seeds": 2}) == EXIT_DONE


def test_a_named_checkpoint_belongs_to_one_seed(three, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, flags(**three, resume_from_checkpoint="somewhere"))
    assert stopped.value.code == EXIT_USER_ERROR
    assert "each seed has checkpoints of its own; expected latest" in capsys.readouterr().err


def test_verify_tries_one_seed(three, tmp_path):
    from ft.runtime import resolve_batch_size
    from ft.verify import _Matrix

    config = parse(Config, flags(**three, early_stopping_patience=2, early_stopping_threshold=0.1))
    resolve_batch_size(config, 1)
    _Matrix(config, tmp_path)
    assert parse(Config, [str(tmp_path / "config.yaml")]).num_seeds == 1


def test_seeds_of_other_data_are_not_one_experiment(three, reviews, tmp_path):
    data = shutil.copytree(reviews, tmp_path / "data")
    three |= {"dataset_name": data, "max_train_steps": 2, "num_seeds": 2}
    assert train_here(**three) == EXIT_DONE
    path = data / "train.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    more = {**three, "num_seeds": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="seed-7' was trained on other data: train changed since"):
        train_here(**more)
    assert not (tmp_path / "run/seed-9").exists()
    shutil.copy(reviews / "train.csv", path)
    assert train_here(**more) == EXIT_DONE
