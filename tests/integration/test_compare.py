"""`eval.py --compare`: two runs on the same rows, refused if they are not, scored first if needed."""

import csv
import json
import os
import shutil
import time

import numpy as np
import pytest
import yaml
from conftest import FORK, FORKS, flags, forget_accelerator, launch, score_here, train_here

import eval as evaluation
from ft.cli import parse
from ft.compare import runs_in
from ft.config import EvalConfig
from ft.errors import EXIT_DONE, EXIT_USER_ERROR, UserError


def write(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def one_label(right, label="yes"):
    """Rows of two classes, predicted correctly or not."""
    other = {"yes": "no", "no": "yes"}
    return [
        {"row": row, "text": f"text {row}", "label": label, "prediction": label if good else other[label]}
        | {"probabilities": {"no": 0.1, "yes": 0.9} if (label == "yes") == good else {"no": 0.9, "yes": 0.1}}
        for row, good in enumerate(right)
    ]


def several(predictions):
    truth = ["a"]
    return [
        {"row": row, "text": f"text {row}", "label": truth, "prediction": found}
        | {"probabilities": {name: 0.8 if name in found else 0.2 for name in "abc"}}
        for row, found in enumerate(predictions)
    ]


def numbers(predictions):
    return [
        {"row": r, "text": f"t{r}", "label": float(r), "prediction": p} for r, p in enumerate(predictions)
    ]


def compare(one, other, output, **more):
    forget_accelerator()
    words = ["--compare", str(one), str(other), *flags(output_dir=output, **more)]
    assert evaluation.score(parse(EvalConfig, words)) == EXIT_DONE
    return json.loads((output / "comparison.json").read_text())


def test_one_label_by_hand(tmp_path, capsys):
    a = write(tmp_path / "a", one_label([True] * 8 + [False] * 2 + [True] * 30))
    b = write(tmp_path / "b", one_label([False] * 8 + [True] * 2 + [True] * 30))
    found = compare(a, b, tmp_path / "out")
    accuracy = found["metrics"]["accuracy"]
    assert (accuracy["a"], accuracy["b"]) == (38 / 40, 32 / 40)
    assert accuracy["difference"] == pytest.approx(-0.15) and accuracy["low"] < -0.15 < accuracy["high"]
    assert accuracy["test"] == "McNemar, exact" and accuracy["p_value"] == pytest.approx(112 / 1024)
    assert found["metrics"]["f1_macro"]["test"] == "permutation"
    assert (found["only_a_right"], found["only_b_right"]) == (8, 2)
    assert found["only_b_right_rows"] == [
        {"row": row, "text": f"text {row}", "label": "yes", "a": ["no"], "b": ["yes"]} for row in (8, 9)
    ]
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "0.9500" in shown and "-0.1500" in shown
    assert "only one is right: A in 8 rows, B in 2" in shown
    assert "not other seeds" in shown


def test_columns_may_be_called_as_the_sides_are(tmp_path):
    lines = [{"a": "one", "b": "two", **line} for line in one_label([True] * 9 + [False])]
    right = [{"a": "one", "b": "two", **line} for line in one_label([True] * 10)]
    sides = write(tmp_path / "wrong", lines), write(tmp_path / "right", right)
    (row,) = compare(*sides, tmp_path / "out")["only_b_right_rows"]
    assert (row["column a"], row["column b"], row["a"], row["b"]) == ("one", "two", ["no"], ["yes"])


def test_several_labels_and_numbers(tmp_path):
    a = write(tmp_path / "a", several([["a"]] * 30 + [["a", "b"]] * 10))
    b = write(tmp_path / "b", several([["a"]] * 20 + [[]] * 20))
    found = compare(a, b, tmp_path / "out")
    assert found["metrics"]["f1_micro"]["a"] == pytest.approx(80 / 90)
    assert found["metrics"]["f1_micro"]["b"] == pytest.approx(40 / 60)
    assert found["metrics"]["f1_micro"]["test"] == "permutation" and (
        found["only_a_right"],
        found["only_b_right"],
    ) == (10, 0)
    generator = np.random.default_rng(0)
    a = write(tmp_path / "c", numbers(np.arange(60) + generator.normal(size=60)))
    b = write(tmp_path / "d", numbers(np.arange(60) + 4 * generator.normal(size=60)))
    found = compare(a, b, tmp_path / "out")
    assert found["metrics"]["mse"]["low"] > 0 and found["metrics"]["mse"]["p_value"] < 0.01
    assert found["a_closer"] + found["b_closer"] == 60 and found["a_closer"] > found["b_closer"]
    worst = found["a_closer_rows"][0]
    assert abs(worst["b"][0] - worst["label"]) > abs(worst["a"][0] - worst["label"])


def test_what_is_not_defined_is_null_and_said(tmp_path, capsys):
    a = write(tmp_path / "a", numbers([7.0] * 30))
    b = write(tmp_path / "b", numbers([row + (-1) ** row for row in range(30)]))
    found = compare(a, b, tmp_path / "out")["metrics"]["spearmanr"]
    assert found["a"] is found["difference"] is found["low"] is found["p_value"] is None and found["b"] > 0.9
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spearmanr")]
    assert line.split() == ["spearmanr", "not", "defined", f"{found['b']:.4f}", "not", "defined"]


def test_the_order_of_the_lines_and_of_the_labels_does_not_matter(tmp_path):
    right = [True] * 15 + [False] * 5
    a = write(tmp_path / "a", one_label(right))
    turned = [
        line | {"probabilities": dict(reversed(line["probabilities"].items()))}
        for line in reversed(one_label(right))
    ]
    found = compare(a, write(tmp_path / "b", turned), tmp_path / "out")
    assert all(entry["difference"] == 0 for entry in found["metrics"].values())
    assert found["only_a_right"] == found["only_b_right"] == 0


def with_ids(lines, name="id", kind=int):
    return [line | {name: kind(line["row"])} for line in lines]


LINES = one_label([True] * 9 + [False])


@pytest.mark.parametrize("lines", [LINES, with_ids(LINES, "key"), with_ids(LINES, kind=str)])
def test_the_same_rows_may_have_come_without_ids_or_with_others(tmp_path, lines):
    """Ids are texts if read from a csv, and numbers from a jsonl."""
    a, b = write(tmp_path / "a", with_ids(LINES)), write(tmp_path / "b", lines)
    assert compare(a, b, tmp_path / "out")["rows"] == 10


def changed(lines, row, **values):
    return [line | (values if line["row"] == row else {}) for line in lines]


REFUSED = {
    "fewer rows": (LINES[:-1], r"the rows differ: .*scored 10 rows, .* 9; row 9 is in only one of them"),
    "other rows": ([line | {"row": line["row"] + 5} for line in LINES], "row 0 is in only one of them"),
    "a row twice": ([*LINES, LINES[3]], "some rows occur twice"),
    "another text": (changed(LINES, 4, text="other"), "row 4 has other texts in"),
    "another column": (
        [{("title" if key == "text" else key): value for key, value in line.items()} for line in LINES],
        "row 0 has other texts",
    ),
    "another label": (changed(LINES, 4, label="no"), r"row 4 has other labels in .* \('yes' and 'no'\)"),
    "other labels": (
        [line | {"probabilities": {**line["probabilities"], "perhaps": 0.0}} for line in LINES],
        "the tasks differ: .* has 2 labels, .* 3; one of them alone has perhaps",
    ),
    "several labels": (several([["a"]] * 10), "the tasks differ: .* one label a row, .* any number of"),
    "numbers": (numbers(range(10)), "the tasks differ: .* predicts one label a row, .* a number a row"),
    "no labels": ([{k: v for k, v in line.items() if k != "label"} for line in LINES], "line 1 has no label"),
    "an unknown label": (changed(LINES, 2, prediction="maybe"), "line 3 is no prediction of eval.py"),
    "words for numbers": (
        [{k: v for k, v in line.items() if k != "probabilities"} for line in LINES],
        "line 1 is no prediction of eval.py",
    ),
    "another format": ([{"id": 3}], "line 1 is no prediction of eval.py"),
    "nothing": ([], "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, case):
    lines, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        compare(write(tmp_path / "a", LINES), write(tmp_path / "b", lines), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_predictions_in_another_format_are_named(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/predictions.csv").touch()
    with pytest.raises(UserError, match=r"found predictions.csv: evaluate with --predictions_format jsonl"):
        compare(write(tmp_path / "a", LINES), tmp_path / "b", tmp_path / "out")


def test_predictions_of_another_split_are_refused(tmp_path):
    a, b = write(tmp_path / "a", LINES), write(tmp_path / "b", LINES)
    for folder in (a, b):
        (folder / "results.json").write_text('{"split": "test"}')
    assert compare(a, b, tmp_path / "out", split="test")["rows"] == 10
    with pytest.raises(UserError, match=r"holds the predictions of the test split, not those of validation"):
        compare(a, b, tmp_path / "out", split="validation")


@pytest.mark.parametrize("words", [{"compare": "a,b"}, {"model_name_or_path": "m", "test_file": "t.csv"}])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_scored(tmp_path, words):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"output_dir: .*out' is a file; name a folder"):
        score_here(**words, output_dir=tmp_path / "out")


def test_a_line_that_is_cut_short_is_named(tmp_path):
    b = write(tmp_path / "b", LINES)
    (b / "predictions.jsonl").write_text((b / "predictions.jsonl").read_text()[:-9])
    with pytest.raises(UserError, match="line 10 is no prediction"):
        compare(write(tmp_path / "a", LINES), b, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "one"], "compare: found 1 runs (one), expected two"),
        (["--compare", "one", "two", "three"], "compare: found 3 runs"),
        (
            ["--compare", "one", "two", "--max_length", "9"],
            "compare: max_length would do nothing: each run is",
        ),
        (["--compare", "missing", "missing"], "compare: 'missing' is not a folder"),
        (["--compare", ".", "."], "compare: '.' holds neither predictions.jsonl nor a finished run"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_and_exit_2(words, message):
    done = launch(FORK, words, script="eval.py")
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.count("\n") == 1 and message in done.stderr and done.stdout == ""


# --- training runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, reviews):
    """Two recipes with two seeds each; `deep` learns well. The data is beside them, in `data`."""
    root = tmp_path_factory.mktemp("trained")
    reviews = shutil.copytree(reviews, root / "data")
    for name, epochs in (("deep", 12), ("short", 1)):
        values = {"model_name_or_path": tiny_model, "dataset_name": reviews, "num_train_epochs": epochs}
        values |= {"learning_rate": 3e-3, "num_seeds": 2, "save_strategy": "no", "output_dir": root / name}
        assert train_here(**values) == EXIT_DONE
    return root


def test_training_runs_are_scored_first_and_only_once(trained, tmp_path, capsys):
    deep, short = trained / "deep" / "seed-43", trained / "short" / "seed-42"
    for run in (deep, short):  # left by another test of this worker
        shutil.rmtree(run / "evaluation-test", ignore_errors=True)
    found = compare(short, deep, tmp_path / "out")
    assert capsys.readouterr().out.count("test: 47 rows") == 2
    reported = [json.loads((run / "results.json").read_text())["test/accuracy"] for run in (short, deep)]
    accuracy = found["metrics"]["accuracy"]
    assert [accuracy["a"], accuracy["b"]] == pytest.approx(reported)
    assert accuracy["low"] > 0 and accuracy["p_value"] < 0.01
    again = compare(short, deep, tmp_path / "out")
    assert "test: 47 rows" not in capsys.readouterr().out and again == found
    later = time.time() + 100  # the run continued: it has another best model
    os.utime(deep / "best" / "config.json", (later, later))
    compare(short, deep, tmp_path / "out")
    assert capsys.readouterr().out.count("test: 47 rows") == 1
    found = compare(short, deep, tmp_path / "out", split="validation")
    assert found["rows"] == 61


def test_a_change_of_the_data_is_seen_and_what_is_gone_is_not_asked_for(trained, tmp_path, capsys):
    deep, short = trained / "deep" / "seed-42", trained / "short" / "seed-42"
    compare(short, deep, tmp_path / "out")
    path = trained / "data" / "test.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert compare(short, deep, tmp_path / "out")["rows"] == 46
    assert capsys.readouterr().out.count("test: 46 rows") == 2
    path.parent.rename(trained / "away")
    assert compare(short, deep, tmp_path / "out")["rows"] == 46
    (trained / "away").rename(trained / "data")
    path.write_text("".join(lines))


def test_runs_of_different_tasks_are_refused_before_any_is_scored(trained, tmp_path):
    sides = [shutil.copytree(trained / "short" / "seed-42", tmp_path / name) for name in ("one", "other")]
    for side in sides:
        shutil.rmtree(side / "evaluation-test", ignore_errors=True)
    place = sides[1] / "best" / "config.json"
    place.write_text(place.read_text().replace("single_label", "multi_label"))
    with pytest.raises(UserError, match=r"the tasks differ: .*one label a row, .*any number of labels"):
        compare(*sides, tmp_path / "out")
    assert not any((side / "evaluation-test").exists() for side in sides)


def test_an_evaluation_of_another_model_in_the_folder_of_a_run_is_not_taken_for_its_own(
    trained, reviews, tmp_path
):
    deep, short = trained / "deep" / "seed-43", trained / "short" / "seed-42"
    before = compare(short, deep, tmp_path / "out")["metrics"]
    score_here(model_name_or_path=deep / "best", dataset_name=reviews, output_dir=short)
    assert compare(short, deep, tmp_path / "out")["metrics"] == before


def test_what_else_a_user_has_in_the_folder_of_a_run_stays(trained, tmp_path, capsys):
    pytest.importorskip("cleanlab")
    deep, short = (shutil.copytree(trained / name / "seed-42", tmp_path / name) for name in ("deep", "short"))
    for side in (deep, short):
        shutil.rmtree(side / "evaluation-test", ignore_errors=True)
    before = compare(short, deep, tmp_path / "out")["metrics"]
    place = short / "evaluation-test"
    words = {"model_name_or_path": short / "best", "output_dir": short, "split": "test"}
    words["config"] = short / "config.yaml"

    # Suspected label errors, for the same scores; and a user's table beside them.
    score_here(**words, suspected_label_errors="true")
    (place / "predictions.xlsx").write_text("of the user")
    kept = {path.name: path.read_bytes() for path in place.iterdir()}
    capsys.readouterr()
    assert compare(short, deep, tmp_path / "out")["metrics"] == before
    assert "test: 47 rows" not in capsys.readouterr().out

    # Predictions on new texts.
    (tmp_path / "new.jsonl").write_text('{"text": "a great film"}\n')
    score_here(**words, test_file=tmp_path / "new.jsonl")
    new = (place / "predictions.jsonl").read_bytes()
    assert "label_errors.jsonl" in kept and new.count(b"\n") == 1
    for _ in range(2):
        capsys.readouterr()
        assert compare(short, deep, tmp_path / "out")["metrics"] == before
        assert (place / "predictions.jsonl").read_bytes() == new
    assert "test: 47 rows" not in capsys.readouterr().out  # the second time, compared-test has them


def test_the_format_of_an_evaluation_is_what_its_results_say(trained, reviews, tmp_path):
    words = {"model_name_or_path": trained / "short/seed-42/best", "dataset_name": reviews}
    for kind in ("jsonl", "parquet"):
        score_here(**words, output_dir=tmp_path / "one", predictions_format=kind)
    later = time.time() + 100  # copying the folder may change the order of its files' times
    os.utime(tmp_path / "one/predictions.jsonl", (later, later))
    with pytest.raises(UserError, match=r"was evaluated again since .*, with predictions\.parquet"):
        compare(tmp_path / "one", tmp_path / "one", tmp_path / "out")


def test_an_evaluation_in_the_folder_of_several_seeds_has_a_place_of_its_own(trained, reviews):
    before = (trained / "short/results.json").read_bytes()
    best = trained / "short/seed-42/best"
    assert (
        score_here(model_name_or_path=best, dataset_name=reviews, output_dir=trained / "short") == EXIT_DONE
    )
    assert (trained / "short/results.json").read_bytes() == before
    assert (trained / "short/evaluation-test/results.json").exists()


def test_with_seeds_a_side_is_a_folder_of_runs(trained, tmp_path, capsys):
    found = compare(trained / "short", trained / "deep", tmp_path / "out")
    runs = found["metrics"]["accuracy"]
    results = [json.loads((trained / side / "results.json").read_text()) for side in ("short", "deep")]
    assert [runs["a"], runs["b"]] == pytest.approx([result["test/accuracy"] for result in results])
    assert runs["a_runs"] == pytest.approx([run["test/accuracy"] for run in results[0]["runs"].values()])
    assert "A: " in (shown := capsys.readouterr().out) and "(2 seeds)" in shown
    assert runs["test"] == "Welch's t over seeds and rows" and "note" not in found


def test_two_processes_compare_as_one_does(trained, tmp_path):
    here = compare(trained / "short", trained / "deep", tmp_path / "here", split="validation")
    words = ["--compare", str(trained / "short"), str(trained / "deep")]
    for run in trained.glob("*/seed-*/evaluation-validation/predictions.jsonl"):
        run.unlink()
    words += flags(output_dir=tmp_path / "there", split="validation")
    done = launch(FORKS, words, script="eval.py")
    assert done.returncode == EXIT_DONE, done.stderr
    there = json.loads((tmp_path / "there" / "comparison.json").read_text())
    for key in ("a", "b", "difference", "low", "high"):
        assert there["metrics"]["accuracy"][key] == pytest.approx(here["metrics"]["accuracy"][key])
    assert done.stdout.count("only one is right") == 1


def test_a_run_that_is_not_finished_is_not_compared(trained, tmp_path):
    """Although it has a best model from its first evaluation on."""
    runs = [shutil.copytree(trained / "short" / "seed-42", tmp_path / name) for name in ("one", "other")]
    (runs[1] / "results.json").unlink()
    with pytest.raises(UserError, match="other' is not finished; resume it with --resume_from_checkpoint"):
        compare(*runs, tmp_path / "out")


def test_predictions_of_an_older_evaluation_are_not_those_of_the_run_in_the_folder(trained, tmp_path):
    deep, short = (shutil.copytree(trained / name / "seed-42", tmp_path / name) for name in ("deep", "short"))
    expected = compare(short, deep, tmp_path / "out")
    shutil.copy(short / "evaluation-test/predictions.jsonl", deep / "predictions.jsonl")
    assert compare(short, deep, tmp_path / "out") == expected


def test_an_evaluation_of_other_texts_does_not_choose_the_split(trained, tmp_path):
    data = shutil.copytree(trained / "data", tmp_path / "data")
    (data / "test.csv").rename(tmp_path / "new.csv")
    runs = [tmp_path / "one", tmp_path / "other"]
    for number, run in enumerate(runs):
        words = {"dataset_name": data, "max_train_steps": 2, "seed": number, "save_strategy": "no"}
        tiny = yaml.safe_load((trained / "short/seed-42/config.yaml").read_text())["model_name_or_path"]
        assert train_here(**words, model_name_or_path=tiny, output_dir=run) == EXIT_DONE
    score_here(
        model_name_or_path=runs[0] / "best", test_file=tmp_path / "new.csv", output_dir=runs[0],
        predictions_format="csv",
    )  # fmt: skip
    assert compare(*runs, tmp_path / "out")["rows"] == 61  # those of the validation split


def test_a_run_of_the_user_beside_the_seeds_is_none_of_them(trained, tmp_path):
    seeds = shutil.copytree(trained / "short", tmp_path / "seeds")
    shutil.copytree(trained / "short/seed-42", seeds / "seed-7")
    assert [path.name for path in runs_in(seeds)] == ["seed-42", "seed-43"]
    (seeds / "seeds.json").unlink()  # each trained by a command of its own
    assert [path.name for path in runs_in(seeds)] == ["seed-7", "seed-42", "seed-43"]


def test_a_test_split_without_labels_is_not_what_runs_are_compared_on(trained, tmp_path):
    data = shutil.copytree(trained / "data", tmp_path / "data")
    with open(data / "test.csv", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with open(data / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([text, -1] for text in texts)])
    tiny = yaml.safe_load((trained / "short/seed-42/config.yaml").read_text())["model_name_or_path"]
    runs = [tmp_path / "one", tmp_path / "other"]
    for number, run in enumerate(runs):
        words = {"dataset_name": data, "max_train_steps": 2, "seed": number, "save_strategy": "no"}
        assert train_here(**words, model_name_or_path=tiny, output_dir=run) == EXIT_DONE
    assert compare(*runs, tmp_path / "out")["rows"] == 61  # those of the validation split


@pytest.mark.parametrize("place", ["in the folder", "as a file"])
def test_rows_set_aside_in_the_place_of_an_unlabelled_test_split_are_what_runs_are_compared_on(
    trained, tmp_path, place
):
    data = shutil.copytree(trained / "data", tmp_path / "data")
    (data / "test.csv").write_text("text\nthe film was great\n")
    words = {"dataset_name": data, "test_split_percentage": 20, "max_train_steps": 2, "save_strategy": "no"}
    if place == "as a file":
        words["test_file"] = (data / "test.csv").rename(tmp_path / "unlabelled.csv")
    tiny = yaml.safe_load((trained / "short/seed-42/config.yaml").read_text())["model_name_or_path"]
    runs = [tmp_path / "one", tmp_path / "other"]
    for number, run in enumerate(runs):
        assert train_here(**words, seed=number, model_name_or_path=tiny, output_dir=run) == EXIT_DONE
    found = compare(*runs, tmp_path / "out")
    reported = [json.loads((run / "results.json").read_text())["test/accuracy"] for run in runs]
    accuracy = found["metrics"]["accuracy"]
    assert found["rows"] == 41 and [accuracy["a"], accuracy["b"]] == pytest.approx(reported)
    assert compare(*runs, tmp_path / "out") == found  # which exist now

    for run in runs:  # what the user has scored stays
        best = {"model_name_or_path": run / "best", "output_dir": run, "split": "validation"}
        data = {
            key: words[key] for key in words if key in ("dataset_name", "test_file", "test_split_percentage")
        }
        assert score_here(**best | data) == EXIT_DONE
    scored = [run / "evaluation-validation/results.json" for run in runs]
    before = [path.stat().st_mtime_ns for path in scored]
    assert compare(*runs, tmp_path / "out", split="validation")["rows"] == 61
    assert [path.stat().st_mtime_ns for path in scored] == before


def test_runs_that_were_scored_in_different_precisions_are_said(tmp_path, capsys):
    sides = [write(tmp_path / name, one_label([True] * 8 + [False] * 2)) for name in ("x", "y")]
    for precisions, said in ((("no", "bf16"), True), (("bf16", "bf16"), False), (("no", None), False)):
        for side, precision in zip(sides, precisions, strict=True):
            (side / "results.json").write_text(json.dumps({"mixed_precision": precision}))
        compare(*sides, tmp_path / "out")
        found = "WARNING mixed precision: the predictions were made in bf16, fp32" in capsys.readouterr().out
        assert found == said


def test_seeds_of_which_some_go_on_for_longer_are_not_one_side(trained, tmp_path):
    seeds = shutil.copytree(trained / "short", tmp_path / "seeds")
    path = seeds / "seed-43/config.yaml"
    path.write_text(path.read_text().replace("num_train_epochs: 1", "num_train_epochs: 6"))
    with pytest.raises(
        UserError, match=r"num_train_epochs is 1\.0 in .*seed-42', and 6\.0 in seed-43; resume"
    ):
        compare(seeds, trained / "deep", tmp_path / "out")
