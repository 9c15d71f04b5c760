"""The benchmarks' command line: what --quick changes, and mistakes that are said before anything runs."""

import pytest

from benchmarks.__main__ import parse
from benchmarks.common import check_updates, class_file, column_flags, read_csv


@pytest.fixture
def model(tmp_path):
    """The options of a data and a model folder that are there; the benchmark's own may not be installed."""
    return ["--data", str(tmp_path), "--model", str(tmp_path)]


def test_quick_changes_defaults_alone(model):
    quick = parse(["throughput", "--quick", *model])
    assert (quick.updates, quick.rounds) == (15, 1)
    typed = parse(["throughput", "--quick", "--rounds", "2", "--updates", "12", *model])
    assert (typed.updates, typed.rounds, typed.arms) == (12, 2, quick.arms)
    assert parse(["throughput", *model]).rounds == 5


@pytest.mark.parametrize(
    "words",
    [
        ["throughput", "--name", "a/b"],
        ["throughput", "--arms", "ours", "ours"],
        ["throughput", "--updates", "5"],
        ["exactness", "--updates", "5"],
        ["memory", "--rounds", "0"],
        ["encode", "--rows", "0"],
        ["encode", "--", "--seed", "3"],
        ["throughput", "--model", "nosuch/model"],
        ["throughput", "--model", "/nonexistent"],
    ],
)
def test_mistakes_are_said_at_once(words, model, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([words[0], *model, *words[1:]])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_a_relative_model_folder_is_resolved(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["memory", "--data", ".", "--model", "model"]).model == str(tmp_path / "model")


def test_more_updates_than_full_batches_are_refused():
    check_updates(3, 100, 32)
    with pytest.raises(SystemExit, match="at most 3 with 100 rows"):
        check_updates(4, 100, 32)


def test_scores_become_classes_of_pairs(tmp_path):
    (tmp_path / "train.csv").write_text("sentence1,sentence2,score\na,b,4.6\nc,d,0.2\n")
    path = class_file(tmp_path, "train")
    assert path.read_text().splitlines()[0] == "sentence1,sentence2,label"
    assert read_csv(path) == ([("a", "b"), ("c", "d")], ["5", "0"])
    assert column_flags(path) == {"text_column_names": "sentence1,sentence2"}
