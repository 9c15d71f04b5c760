"""What results.json has beyond the metrics: intervals, calibration, slices, worst errors, suspects."""

import csv
import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import FORK, flags, launch, make_rows, score_here, train_here, write_csv
from sklearn.metrics import log_loss

from ft.cli import parse
from ft.compare import _marks
from ft.config import EvalConfig
from ft.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

SHOPS = ["north", "south", "", "east"]  # in csv, a missing value is an empty text


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """Reviews with a column that no model reads."""
    folder = tmp_path_factory.mktemp("shops")
    for seed, (name, count) in enumerate({"train": 203, "validation": 61, "test": 147}.items()):
        rows = make_rows(count, seed)
        write_csv(
            folder / f"{name}.csv",
            [row | {"shop": SHOPS[n % 4 if n % 3 else 0]} for n, row in enumerate(rows)],
        )
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, shops):
    """A run that gets some rows wrong, scored again by eval.py."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    values = {"model_name_or_path": tiny_model, "dataset_name": shops, "learning_rate": 3e-3}
    values |= {"num_train_epochs": 5, "output_dir": folder, "slice_columns": "shop", "seed": 5}
    assert train_here(**values, drawn=True) == EXIT_DONE
    words = [
        str(folder / "config.yaml"),
        *flags(model_name_or_path=folder / "best", suspected_label_errors="true"),
    ]
    done = launch(FORK, words, script="eval.py")
    assert done.returncode == EXIT_DONE, done.stderr
    return folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def predictions_of(folder):
    lines = (folder / "evaluation-test" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_eval_says_what_training_said(trained):
    ours, again = results_of(trained), results_of(trained / "evaluation-test")
    theirs = {key: value for key, value in again.items() if key.startswith("test/")}
    assert theirs == {key: value for key, value in ours.items() if key.startswith("test/")}
    assert again["headline"] == ours["headline"] == ["accuracy", "f1_macro"]
    pages = [(trained / place / "report.html").read_text() for place in (".", "evaluation-test")]
    assert all(f"<b>{ours['test/accuracy']:#.4g}</b>" in page and "south" in page for page in pages)
    assert ["#curves" in page for page in pages] == [True, False]


def test_each_metric_has_an_interval_around_it(trained):
    results = results_of(trained)
    for split in ("eval", "test"):
        for name in ("accuracy", "f1_macro", "f1_weighted", "matthews_correlation", "auroc"):
            low, value, high = (results[f"{split}/{name}{end}"] for end in ("_low", "", "_high"))
            assert low <= value <= high and 0 < high - low < 0.4, name
    right = np.array([line["prediction"] == line["label"] for line in predictions_of(trained)])
    drawn = right[np.random.default_rng(1).integers(0, len(right), size=(10_000, len(right)))].mean(axis=1)
    interval = [results["test/accuracy_low"], results["test/accuracy_high"]]
    assert interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_the_end_of_a_run_shows_them(trained, capsys, base_flags):
    assert train_here(**base_flags) == EXIT_DONE
    results = results_of(base_flags["output_dir"])
    low, high = results["test/accuracy_low"], results["test/accuracy_high"]
    assert f"accuracy {results['test/accuracy']:.4f} ({low:.4f} to {high:.4f})" in capsys.readouterr().out


def test_calibration_and_coverage(trained):
    results, lines = results_of(trained), predictions_of(trained)
    table = results["test/reliability"]
    assert sum(row["count"] for row in table) == len(lines) == 147
    share = sum(row["count"] * row["share"] for row in table) / 147
    assert share == pytest.approx(results["test/accuracy"])
    gaps = sum(row["count"] * abs(row["share"] - row["probability"]) for row in table) / 147
    assert gaps == pytest.approx(results["test/ece"])
    names = sorted(lines[0]["probabilities"])
    given = [[line["probabilities"][name] for name in names] for line in lines]
    assert results["test/log_loss"] == pytest.approx(log_loss([x["label"] for x in lines], given), abs=1e-4)
    assert results["test/log_loss"] == pytest.approx(results["test/loss"], abs=1e-5)
    curve = results["test/coverage"]
    assert curve[-1]["coverage"] == 1 and curve[-1]["accuracy"] == pytest.approx(results["test/accuracy"])
    surest = results["test/surest"]["0.9"]
    confident = [x for x in lines if max(x["probabilities"].values()) >= surest["confidence"] - 1e-6]
    assert len(confident) / 147 == pytest.approx(surest["coverage"])
    right = np.mean([line["prediction"] == line["label"] for line in confident])
    assert right == pytest.approx(surest["accuracy"]) and right >= 0.9


def test_slices_by_a_column_and_by_length(trained, shops):
    results, lines = results_of(trained), predictions_of(trained)
    with open(shops / "test.csv", newline="") as file:
        shop_of = [row["shop"] for row in csv.DictReader(file)]
    slices = {one["value"]: one for one in results["test/slices"]["shop"]}
    assert set(slices) == set(SHOPS)
    for shop, one in slices.items():
        right = [x["prediction"] == x["label"] for x in lines if shop_of[x["row"]] == shop]
        assert one["rows"] == len(right) and one["accuracy"] == pytest.approx(np.mean(right))
        assert one["accuracy_low"] < one["accuracy"] <= one["accuracy_high"] and "f1_macro_low" in one
    assert [one["rows"] for one in results["test/slices"]["shop"]] == sorted(
        (one["rows"] for one in slices.values()), reverse=True
    )
    lengths = results["test/length_slices"]
    assert sum(one["rows"] for one in lengths) == 147 and len(lengths) == 5
    assert results["eval/slices"]["shop"]


def test_worst_errors_and_confused_pairs(trained):
    results, lines = results_of(trained), predictions_of(trained)
    wrong = [line for line in lines if line["prediction"] != line["label"]]
    wrong.sort(key=lambda line: -line["probabilities"][line["prediction"]])
    worst = results["test/worst_errors"]
    assert 0 < len(worst) == min(20, len(wrong))
    for one, line in zip(worst, wrong, strict=False):
        assert one["confidence"] == pytest.approx(line["probabilities"][line["prediction"]], abs=1e-6)
    by_row = {line["row"]: line for line in wrong}
    for one in worst:
        line = by_row[one["row"]]
        assert (one["text"], one["label"], one["prediction"]) == (
            line["text"],
            line["label"],
            line["prediction"],
        )
    pairs = results["test/confused_pairs"]
    assert sum(pair["rows"] for pair in pairs) == len(wrong)
    first = pairs[0]
    assert first["rows"] == sum(
        (x["label"], x["prediction"]) == (first["label"], first["prediction"]) for x in wrong
    )


def test_suspected_label_errors_are_rows_of_the_split(trained):
    lines = {line["row"]: line for line in predictions_of(trained)}
    text = (trained / "evaluation-test" / "label_errors.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert found and all({**lines[one["row"]], "label_quality": one["label_quality"]} == one for one in found)
    quality = [one["label_quality"] for one in found]
    assert quality == sorted(quality)
    assert all(
        one["label_quality"] == pytest.approx(one["probabilities"][one["label"]], abs=1e-5) for one in found
    )


def test_rows_that_were_set_aside_keep_their_column(tiny_model, shops, tmp_path):
    """They are rows of the training file, counted with those that were dropped."""
    with open(shops / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3]["text"] = ""
    for row in rows:
        row["shop"] = row["label"]  # so that each slice has one label
    path = write_csv(tmp_path / "all.csv", rows)
    assert train_here(
        model_name_or_path=tiny_model, train_file=path, output_dir=tmp_path / "run", on_bad_rows="drop",
        max_train_steps=2, slice_columns="shop", validation_split_percentage=30,
    ) == EXIT_DONE  # fmt: skip
    results = results_of(tmp_path / "run")
    slices = {one["value"]: one["rows"] for one in results["eval/slices"]["shop"]}
    assert slices == {name: row["support"] for name, row in results["eval/per_class"].items()}


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_a_slice_column_that_is_not_there_is_one_message_before_training(
    trained, base_flags, tmp_path, script
):
    base_flags |= {"slice_columns": "shop", "output_dir": tmp_path / "out"}
    if script == "eval.py":
        base_flags |= {"model_name_or_path": trained / "best"}
    done = launch(FORK, flags(**base_flags), script=script)
    assert done.returncode == EXIT_USER_ERROR and done.stderr.count("\n") == 1
    split = "validation" if script == "train.py" else "test"
    assert (
        f"slice_columns: the {split} data has no column 'shop'; its columns: 'text', 'label'" in done.stderr
    )
    assert done.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [{"text": "a film"}, {"text": "a film", "label": "-1"}])
def test_a_test_split_that_is_not_scored_needs_no_slice_column(base_flags, shops, tmp_path, row):
    folder = shutil.copytree(shops, tmp_path / "copy")
    write_csv(folder / "test.csv", [row])
    words = {**base_flags, "dataset_name": folder, "slice_columns": "shop", "max_train_steps": 1}
    assert train_here(**words, test_split_percentage=10) == EXIT_DONE  # set aside instead
    results = results_of(tmp_path / "run")
    assert results["eval/slices"]["shop"] and results["test/slices"]["shop"]


def test_rows_set_aside_in_the_place_of_an_unlabelled_test_file_can_be_scored_again(
    base_flags, reviews, tmp_path, capsys
):
    unlabelled = write_csv(tmp_path / "test.csv", [{"text": row["text"]} for row in make_rows(9, seed=7)])
    words = {**base_flags, "dataset_name": None, "train_file": reviews / "train.csv", "save_strategy": "no"}
    words = {key: value for key, value in words.items() if value is not None}
    words |= {"test_file": unlabelled, "test_split_percentage": 10, "max_train_steps": 2}
    assert train_here(**words) == EXIT_DONE
    run = tmp_path / "run"
    draw = json.loads((run / "environment.json").read_text())["draw"]
    assert draw["test_split_percentage"] == draw["validation_split_percentage"] == 10
    again = {**words, "model_name_or_path": run / "best", "output_dir": tmp_path / "again"}
    del again["test_file"]
    assert score_here(**again, split="test") == EXIT_DONE
    assert results_of(tmp_path / "again")["test/loss"] == pytest.approx(results_of(run)["test/loss"])
    capsys.readouterr()
    assert score_here(**again | {"output_dir": tmp_path / "kept"}, test_file=unlabelled) == EXIT_DONE
    said = capsys.readouterr().out
    assert "9 rows predicted, none scored" in said
    assert (
        "note: test_split_percentage: the rows that training set aside are scored by eval.py "
        "--test_file null --split test" in said
    )


def test_an_unlabelled_test_split_does_not_have_its_slice_column_looked_for_elsewhere(
    base_flags, shops, tmp_path
):
    folder = shutil.copytree(shops, tmp_path / "copy")
    with open(folder / "train.csv", newline="") as file:
        rows = [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(file)]
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", [{"text": "a film", "shop": "north"}])
    words = {**base_flags, "dataset_name": folder, "slice_columns": "shop", "max_train_steps": 1}
    assert train_here(**words) == EXIT_DONE
    assert results_of(tmp_path / "run")["eval/slices"]["shop"]


def test_an_evaluation_slices_the_rows_that_it_scores_whatever_training_called_its_labels(
    trained, shops, tmp_path
):
    with open(shops / "train.csv", newline="") as file:
        rows = [
            {"text": row["text"], "category": row["label"], "shop": "other"} for row in csv.DictReader(file)
        ]
    write_csv(tmp_path / "train.csv", rows)
    words = {"train_file": tmp_path / "train.csv", "test_file": shops / "test.csv", "slice_columns": "shop"}
    words |= {"model_name_or_path": trained / "best", "output_dir": tmp_path / "out"}
    done = launch(FORK, flags(**words), script="eval.py")
    assert done.returncode == EXIT_DONE, done.stderr
    values = {one["value"] for one in results_of(tmp_path / "out")["test/slices"]["shop"]}
    with open(shops / "test.csv", newline="") as file:
        assert values == {row["shop"] for row in csv.DictReader(file)}


def test_without_cleanlab_it_is_said_before_anything_is_scored(trained, tmp_path, monkeypatch):
    import importlib.util

    import eval as evaluation
    from ft.cli import parse
    from ft.config import EvalConfig

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cleanlab" else real(name))
    words = [
        str(trained / "config.yaml"),
        *flags(model_name_or_path=trained / "best", output_dir=tmp_path / "out"),
    ]
    with pytest.raises(UserError, match=r"cleanlab is not installed; pip install '\.\[cleanlab\]'"):
        evaluation.score(parse(EvalConfig, [*words, "--suspected_label_errors"]))
    assert not (tmp_path / "out").exists()


def test_rows_that_were_set_aside_are_not_drawn_anew_where_they_would_be_others(tiny_model, tmp_path):
    path = write_csv(tmp_path / "all.csv", make_rows(80))
    words = {"model_name_or_path": tiny_model, "train_file": path, "max_train_steps": 2}
    assert train_here(**words, save_strategy="no", output_dir=tmp_path / "run") == EXIT_DONE
    asked = {"train_file": path, "model_name_or_path": tmp_path / "run/best", "output_dir": tmp_path / "out"}
    assert score_here(**asked) == EXIT_DONE
    with pytest.raises(UserError, match=r"validation_split_percentage is 30, and was 10 then.*test_file"):
        score_here(**asked, validation_split_percentage=30)
    held_out = write_csv(tmp_path / "held_out.csv", make_rows(30, seed=1))
    # No share of them is for testing, with or without test rows.
    assert score_here(**asked, test_file=held_out, split="validation") == EXIT_DONE
    more = {"validation_file": held_out, "save_strategy": "no", "output_dir": tmp_path / "other"}
    assert train_here(**words, **more) == EXIT_DONE  # trained on all of its rows
    of_all = {**asked, "model_name_or_path": tmp_path / "other/best"}
    with pytest.raises(UserError, match=r"validation_split_percentage is 10, and was not used then"):
        score_here(**of_all)
    assert score_here(**of_all, validation_file=held_out) == EXIT_DONE
    write_csv(path, make_rows(80)[1:])
    with pytest.raises(UserError, match=r"the training data has changed since.*has learned"):
        score_here(**asked)
    assert score_here(**asked, split="train") == EXIT_DONE
    assert score_here(**{**asked, "train_file": None}, test_file=path) == EXIT_DONE


def test_set_aside_rows_depend_on_the_labels_and_on_the_bad_rows(tiny_model, tmp_path):
    """Stratified by other labels, or drawn from other rows, they would be different."""
    rows = [{**row, "gold": "good" if i % 3 else "bad"} for i, row in enumerate(make_rows(80))]
    path = write_csv(
        tmp_path / "all.csv", [{**row, "second": row["text"] if i > 1 else ""} for i, row in enumerate(rows)]
    )
    words = {
        "train_file": path,
        "text_column_names": "text",
        "label_column_name": "label",
        "on_bad_rows": "drop",
    }
    more = {"model_name_or_path": tiny_model, "max_train_steps": 2, "save_strategy": "no"}
    assert train_here(**words, **more, output_dir=tmp_path / "run") == EXIT_DONE
    asked = {**words, "model_name_or_path": tmp_path / "run/best", "output_dir": tmp_path / "out"}
    assert score_here(**asked) == EXIT_DONE
    with pytest.raises(
        UserError, match="label_column_name is 'gold', and was 'label' then: they would differ"
    ):
        score_here(**{**asked, "label_column_name": "gold"})
    with pytest.raises(UserError, match="other rows are dropped from the training data than then"):
        score_here(**{**asked, "text_column_names": "second"})


def test_test_rows_that_the_model_was_trained_on_are_said(tiny_model, tmp_path, capsys):
    path = write_csv(tmp_path / "all.csv", make_rows(80))
    words = {"train_file": path, "max_train_steps": 2, "save_strategy": "no", "output_dir": tmp_path / "run"}
    assert train_here(model_name_or_path=tiny_model, **words) == EXIT_DONE
    asked = {"model_name_or_path": tmp_path / "run/best", "output_dir": tmp_path / "out"}
    said = "note: WARNING test: these are the rows of the data that the model was trained on"
    for name, rows in {"copy.csv": make_rows(80), "other.csv": make_rows(80, seed=1)}.items():
        capsys.readouterr()
        assert score_here(**asked, test_file=write_csv(tmp_path / name, rows)) == EXIT_DONE
        assert (said in capsys.readouterr().out) == (name == "copy.csv")


def test_a_second_training_says_where_it_measures_itself_on_rows_that_its_model_has_learned(
    tiny_model, tmp_path, capsys
):
    rows = make_rows(80)
    path = write_csv(tmp_path / "all.csv", rows)
    words = {"train_file": path, "max_train_steps": 2, "save_strategy": "no"}
    assert train_here(model_name_or_path=tiny_model, **words, output_dir=tmp_path / "run") == EXIT_DONE
    words["model_name_or_path"] = tmp_path / "run/best"

    def warned(name, **more):
        capsys.readouterr()
        assert train_here(**words | more, output_dir=tmp_path / name) == EXIT_DONE
        said = capsys.readouterr().out.splitlines()
        return [line for line in said if "note: WARNING" in line and "the model in" in line]

    assert warned("same") == []  # the same rows are set aside
    (line,) = warned("otherwise", validation_split_percentage=30, test_split_percentage=10)
    assert "validation and test: set aside" in line and "percentage is 30, and was 10 then" in line
    (line,) = warned("mended", train_file=write_csv(tmp_path / "mended.csv", rows[1:]))
    assert "training data has changed since" in line and "as validation_file" in line
    (line,) = warned("backward", train_file=write_csv(tmp_path / "new.csv", rows[:40]), validation_file=path)
    assert "validation: these are the rows of the data that the model in" in line
    renamed = [{"review": row["text"], "label": row["label"]} for row in rows]  # of other data, it seems
    assert warned("other", train_file=write_csv(tmp_path / "other.csv", renamed)) == []
    others = [row | {"label": f"{row['label']}s"} for row in rows]
    assert warned("others", train_file=write_csv(tmp_path / "others.csv", others)) == []


def test_a_label_column_that_nobody_named_is_said(tiny_model, tmp_path, capsys):
    rows = [{"text": row["text"], "stars": row["label"]} for row in make_rows(80)]
    path = write_csv(tmp_path / "all.csv", rows)
    words = {"train_file": path, "label_column_name": "stars", "max_train_steps": 2, "save_strategy": "no"}
    assert train_here(model_name_or_path=tiny_model, **words, output_dir=tmp_path / "run") == EXIT_DONE
    other = write_csv(tmp_path / "new.csv", [{"text": row["text"], "label": row["stars"]} for row in rows])
    asked = {"model_name_or_path": tmp_path / "run/best", "test_file": other, "output_dir": tmp_path / "out"}
    said = "WARNING label_column_name: the model was trained on the column 'stars', which the data lacks"
    for more, is_said in (({}, True), ({"label_column_name": "label"}, False)):
        capsys.readouterr()
        assert score_here(**asked, **more) == EXIT_DONE
        assert (said in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("is_scored", [True, False])
def test_a_text_column_that_nobody_named_is_said(trained, tmp_path, capsys, is_scored):
    rows = [{"author": row["text"], "label": row["label"]} for row in make_rows(20)]
    other = write_csv(tmp_path / "new.csv", rows if is_scored else [{"author": r["author"]} for r in rows])
    asked = {"model_name_or_path": trained / "best", "test_file": other, "output_dir": tmp_path / "out"}
    said = "WARNING text_column_names: the model was trained on the column 'text', which the data lacks, and "
    for more, is_said in (({}, True), ({"text_column_names": "author"}, False)):
        capsys.readouterr()
        assert score_here(**asked, **more) == EXIT_DONE
        assert (f"{said}reads 'author'" in capsys.readouterr().out) == is_said


def test_another_precision_than_that_of_training_is_said_and_told_apart(
    tiny_model, tmp_path, capsys, monkeypatch
):
    path = write_csv(tmp_path / "all.csv", make_rows(80))
    words = {"train_file": path, "max_train_steps": 2, "save_strategy": "no", "output_dir": tmp_path / "run"}
    assert train_here(model_name_or_path=tiny_model, **words) == EXIT_DONE
    asked = {"model_name_or_path": tmp_path / "run/best", "train_file": path, "output_dir": tmp_path / "out"}
    said, marks = "WARNING mixed precision: training scored in fp32, this launch scores in bf16", set()
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        capsys.readouterr()
        assert score_here(**asked) == EXIT_DONE
        assert (said in capsys.readouterr().out) == (precision == "bf16")
        marks.add(results_of(tmp_path / "out")["options"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    config = parse(EvalConfig, flags(**asked))
    assert len(marks) == 2 and config.mark("bf16") in marks
    assert _marks(config) == {config.mark()}  # --compare accepts the run's own, and that of its launch
    facts = json.loads((tmp_path / "run/environment.json").read_text()) | {"mixed_precision": "bf16"}
    (tmp_path / "run/environment.json").write_text(json.dumps(facts))
    assert _marks(config) == marks


def test_test_rows_that_the_model_was_chosen_by_are_said_and_its_temperature_is_no_news(
    tiny_model, tmp_path, capsys
):
    files = {
        name: write_csv(tmp_path / f"{name}.csv", make_rows(40, seed)) for seed, name in enumerate("abc")
    }
    words = {"train_file": files["a"], "validation_file": files["b"], "output_dir": tmp_path / "run"}
    words |= {"model_name_or_path": tiny_model, "max_train_steps": 2, "save_strategy": "no"}
    assert train_here(**words) == EXIT_DONE
    asked = {"model_name_or_path": tmp_path / "run/best", "output_dir": tmp_path / "out"}
    said = "note: WARNING test: these are the validation rows of the training"
    for name in "bc":
        capsys.readouterr()
        assert score_here(**asked, test_file=files[name]) == EXIT_DONE
        assert (said in capsys.readouterr().out) == (name == "b")
        assert ("test/ece_scaled" in results_of(tmp_path / "out")) == (name == "c")
    asked["validation_file"] = files["b"]
    assert score_here(**asked) == EXIT_DONE
    assert "WARNING validation" not in capsys.readouterr().out  # requested by name


def test_of_a_copied_model_it_is_said_that_set_aside_rows_may_be_learned_ones(tiny_model, tmp_path, capsys):
    path = write_csv(tmp_path / "all.csv", make_rows(80))
    words = {"train_file": path, "max_train_steps": 2, "save_strategy": "no", "output_dir": tmp_path / "run"}
    assert train_here(model_name_or_path=tiny_model, **words) == EXIT_DONE
    shutil.copytree(tmp_path / "run/best", tmp_path / "elsewhere/best")
    asked = {"train_file": path, "output_dir": tmp_path / "out"}
    said = "note: the validation rows are set aside from the training rows; nothing beside the model says"
    capsys.readouterr()
    assert score_here(**asked, model_name_or_path=tmp_path / "elsewhere/best") == EXIT_DONE
    assert said in capsys.readouterr().out
    (tmp_path / "link").symlink_to(tmp_path / "run/best")
    for place in ("run/best", "link"):
        assert score_here(**asked, model_name_or_path=tmp_path / place) == EXIT_DONE
        assert said not in capsys.readouterr().out


def test_if_no_suspects_can_be_found_the_metrics_are_kept(trained, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("ft.analysis.label_errors.suspects", full)
    words = {"model_name_or_path": trained / "best", "suspected_label_errors": "true"}
    data = yaml.safe_load((trained / "config.yaml").read_text())["dataset_name"]
    with pytest.raises(MemoryError):
        score_here(**words, dataset_name=data, output_dir=tmp_path / "out")
    assert {"results.json", "report.html", "predictions.jsonl"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_what_a_count_of_suspects_does_not_say_is_said(trained, tmp_path, capsys):
    asked = {"model_name_or_path": trained / "best", "suspected_label_errors": "true"}
    data = yaml.safe_load((trained / "config.yaml").read_text())["dataset_name"]
    assert score_here(**asked, dataset_name=data, split="train", output_dir=tmp_path / "out") == EXIT_DONE
    assert "it has learned their labels, wrong ones too" in capsys.readouterr().out
    assert score_here(**asked, dataset_name=data, output_dir=tmp_path / "test") == EXIT_DONE
    assert "wrong ones too" not in capsys.readouterr().out
