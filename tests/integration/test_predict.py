"""eval.py on rows without labels: only predictions, in input order, with ids, the same on any launch, one
chunk at a time."""

import csv
import json
import weakref
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import FORKS, ROOT, flags, launch, make_rows, score_here, train_here, write_csv

import ft.predict
import ft.prediction_files
from ft.compare import find_predictions
from ft.errors import EXIT_DONE, UserError
from ft.evaluation_place import held

DATA = {
    "single": ("reviews", {}),
    "tags": ("tags", {"threshold_mode": "per_label"}),
    "scores": ("scores", {"label_column_name": "score"}),
    "windows": ("reviews", {"long_text": "windows", "max_length": 12}),
    "pairs": ("pairs", {"text_column_names": "two,one"}),  # not in the order of the columns
}


@pytest.fixture(scope="module")
def models(tiny_model, reviews, kinds, tmp_path_factory):
    """A run of each kind, a few updates long."""
    folder = tmp_path_factory.mktemp("models")
    for name, (data, options) in DATA.items():
        words = {"model_name_or_path": tiny_model, "learning_rate": 3e-3, "max_train_steps": 12, **options}
        words |= {"dataset_name": reviews if data == "reviews" else kinds / data, "save_strategy": "no"}
        assert train_here(**words, output_dir=folder / name) == EXIT_DONE
    return folder


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(ft.predict, "CHUNK_ROWS", 16)


SMALL_CHUNKS = f"""
import runpy, sys

sys.path.insert(0, {str(ROOT)!r})
import ft.predict

ft.predict.CHUNK_ROWS = 16
runpy.run_path({str(ROOT / "tests/several.py")!r}, run_name="__main__")
"""


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def predict(model, file, folder, **options):
    """Lines of predictions.jsonl."""
    words = {"model_name_or_path": model, "test_file": file, "output_dir": folder, **options}
    assert score_here(**words) == EXIT_DONE
    return rows_of(folder / "predictions.jsonl")


def unlabelled(kinds, reviews, name, path, drop):
    """The test rows of a kind with an id, as jsonl; without the label column, or with an empty one."""
    data = DATA[name][0]
    source = next((reviews if data == "reviews" else kinds / data).glob("test.*"))
    rows = rows_of(source) if source.suffix == ".jsonl" else list(csv.DictReader(source.open()))
    label = next(key for key in rows[0] if key in ("label", "labels", "score"))
    with path.open("w") as file:
        for number, row in enumerate(rows):
            row = {"id": f"r{number}", **row, label: None}
            file.write(json.dumps({k: v for k, v in row.items() if not drop or k != label}) + "\n")
    return source, path


@pytest.mark.parametrize("name", DATA)
def test_every_kind_is_predicted_as_where_it_is_scored(name, models, kinds, reviews, tmp_path, capsys):
    source, file = unlabelled(kinds, reviews, name, tmp_path / "new.jsonl", drop=name != "tags")
    model = models / name / "best"  # whose run knows the columns
    scored = predict(model, source, tmp_path / "scored")
    assert (tmp_path / "scored/results.json").exists()
    capsys.readouterr()
    predicted = predict(model, file, tmp_path / "new")
    said = capsys.readouterr().out
    assert "test: no row has a label" in said and "47 rows predicted, none scored" in said
    assert not (tmp_path / "new/results.json").exists()
    assert [line["row"] for line in predicted] == list(range(47))
    assert [line["id"] for line in predicted] == [f"r{row}" for row in range(47)]
    for mine, its in zip(predicted, scored, strict=True):
        assert list(mine) == ["row", "id", *(key for key in its if key not in ("row", "label"))]
        if name == "scores":
            assert mine["prediction"] == pytest.approx(its["prediction"], rel=1e-5)
            continue
        assert mine["prediction"] == its["prediction"]
        assert mine["probabilities"] == pytest.approx(its["probabilities"], abs=2e-6)
    assert len({str(line.get("probabilities", line["prediction"])) for line in predicted}) > 20


def test_a_text_of_a_folder_that_is_not_utf8_is_a_bad_row_where_no_row_has_a_label(models, tmp_path):
    for name, content in {"a": b"the film", "b": b"caf\xe9"}.items():
        (tmp_path / "new/all").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"new/all/{name}.txt").write_bytes(content)
    words = {"test_file": tmp_path / "new", "label_column_name": "none", "output_dir": tmp_path / "out"}
    words["model_name_or_path"] = models / "single/best"
    with pytest.raises(UserError, match=r"row 1 \(all/b\.txt\)"):
        score_here(**words)
    assert score_here(**words, on_bad_rows="drop") == EXIT_DONE
    (line,) = rows_of(tmp_path / "out/predictions.jsonl")
    assert (line["row"], line["text"]) == (0, "the film")


@pytest.mark.parametrize("name", ["single", "tags", "scores"])
def test_csv_and_parquet_say_the_same_as_jsonl(name, models, kinds, reviews, tmp_path):
    _, file = unlabelled(kinds, reviews, name, tmp_path / "new.jsonl", drop=True)
    words = {"model_name_or_path": models / name / "best", "test_file": file, "output_dir": tmp_path / "out"}
    for kind in ("jsonl", "csv", "parquet"):
        assert score_here(**words, predictions_format=kind) == EXIT_DONE
    lines = rows_of(tmp_path / "out/predictions.jsonl")
    flat = [
        {k: v for k, v in line.items() if k != "probabilities"}
        | {f"probability_{k}": v for k, v in line.get("probabilities", {}).items()}
        for line in lines
    ]
    table = pq.read_table(tmp_path / "out/predictions.parquet")
    assert table.to_pylist() == flat and table.column_names == list(flat[0])
    with (tmp_path / "out/predictions.csv").open(newline="") as text:
        read = list(csv.DictReader(text))
    joined = [{k: "|".join(v) if isinstance(v, list) else str(v) for k, v in line.items()} for line in flat]
    assert read == joined
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predictions.jsonl", "predictions.csv", "predictions.parquet",
    }  # fmt: skip


def test_texts_of_a_spreadsheet_stay_texts_and_one_line_a_field(models, tmp_path):
    texts = ["=1+1", 'say "so"\r\nthen, go', "-1", "@now", "\tthe film"]
    file = write_csv(tmp_path / "new.csv", [{"text": text} for text in texts])
    out = tmp_path / "out"
    words = {"model_name_or_path": models / "single/best", "test_file": file, "output_dir": out}
    assert score_here(**words, predictions_format="csv") == EXIT_DONE
    with (out / "predictions.csv").open(newline="") as text:
        assert [row["text"] for row in csv.DictReader(text)] == texts
    fields = (out / "predictions.csv").read_text().splitlines()[1].split(",")
    assert all(field[0] == field[-1] == '"' for field in fields)


def test_two_processes_write_the_bytes_of_one(models, kinds, reviews, tmp_path):
    """47 rows in chunks of 16, and a single row, of which the second process gets none."""
    one_row = write_csv(tmp_path / "one.csv", [{"text": "the film was great"}])
    _, tags = unlabelled(kinds, reviews, "tags", tmp_path / "tags.jsonl", drop=True)
    jobs = []
    for kind in ("jsonl", "csv", "parquet"):
        jobs.append(
            {"model_name_or_path": models / "tags/best", "test_file": tags, "predictions_format": kind}
        )
    jobs.append({"model_name_or_path": models / "single/best", "test_file": one_row})
    for number, words in enumerate(jobs):
        words |= {"per_device_eval_batch_size": 3}
        assert score_here(**words, output_dir=tmp_path / "on1" / str(number)) == EXIT_DONE
    runs = [("eval", flags(**w, output_dir=tmp_path / "on2" / str(n))) for n, w in enumerate(jobs)]
    (tmp_path / "jobs.json").write_text(json.dumps(runs))
    (tmp_path / "small.py").write_text(SMALL_CHUNKS)
    done = launch(FORKS, [str(tmp_path / "jobs.json")], script=str(tmp_path / "small.py"))
    assert done.returncode == EXIT_DONE, done.stderr
    ours, theirs = ({p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("pred*"))}
                    for f in (tmp_path / "on1", tmp_path / "on2"))  # fmt: skip
    assert ours == theirs and len(ours) == 4


def test_a_chunk_is_gone_before_the_next_is_scored(models, tmp_path, monkeypatch):
    """Never more than one chunk's scores are held, and no rows are scored ahead of writing."""
    file = write_csv(tmp_path / "new.csv", [{"text": row["text"]} for row in make_rows(100)])
    alive, sizes, written = [], [], []
    gather, write = ft.predict.gather_rows, ft.predict.PredictionFile.write

    def gathered(accelerator, parts, begin, end):
        assert sum(written) == begin  # all before it is in the file
        assert [ref for ref in alive if ref() is not None] == []
        (scores,) = gather(accelerator, parts, begin, end)
        alive.append(weakref.ref(scores))
        sizes.append(len(scores))
        return [scores]

    def counted(self, lines):
        lines = list(lines)
        write(self, lines)
        written.append(len(lines))

    monkeypatch.setattr(ft.predict, "gather_rows", gathered)
    monkeypatch.setattr(ft.predict.PredictionFile, "write", counted)
    predict(models / "single/best", file, tmp_path / "out")
    assert sizes == written == [16] * 6 + [4]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_disk_that_is_full_at_the_end_leaves_what_was_there(models, tmp_path, monkeypatch, labelled):
    rows = make_rows(20)
    file, out = write_csv(tmp_path / "new.csv", rows), tmp_path / "out"
    words = {"model_name_or_path": models / "single/best", "test_file": file, "output_dir": out}
    assert score_here(**words) == EXIT_DONE
    if not labelled:
        write_csv(file, [{"text": row["text"]} for row in rows])

    def content():
        return {path.name: path.read_bytes() for path in out.iterdir()}

    before = content()
    assert {"results.json", "report.html", "predictions.jsonl"} <= before.keys()
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(ft.prediction_files.PredictionFile, "_finish", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        score_here(**words)
    assert content() == before


BIG = 2**53 + 1  # which no float64 is
IDS = {
    "found by its name": ([{"IDX": 7, "text": "x"}, {"IDX": 9, "text": "y"}], {}, "IDX", [7, 9]),
    "named": ([{"id": 1, "key": "a", "text": "x"}], {"id_column_name": "key"}, "key", ["a"]),
    "null in a row": ([{"id": None, "text": "x"}, {"id": BIG, "text": "y"}], {}, "id", [None, BIG]),
    "of two types": ([{"id": 1, "text": "x"}, {"id": "b", "text": "y"}], {}, "id", ["1", "b"]),
    "whole, among floats": (
        [{"id": 4006381333931.0, "text": "x"}, {"id": None, "text": "y"}], {}, "id", [4006381333931, None],
    ),
    "none": ([{"text": "x", "other": 3}], {}, None, None),
    "beside a text of any name": ([{"row_id": "a", "body": "x"}], {}, "row_id", ["a"]),
}  # fmt: skip


@pytest.mark.parametrize("rows, options, name, ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids(rows, options, name, ids, kind, models, tmp_path):
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model_name_or_path": models / "single/best", "test_file": tmp_path / "new.jsonl", **options}
    assert score_here(**words, output_dir=tmp_path / "out", predictions_format=kind) == EXIT_DONE
    file = tmp_path / f"out/predictions.{kind}"
    lines = rows_of(file) if kind == "jsonl" else pq.read_table(file).to_pylist()
    if name is None:
        assert list(lines[0])[:2] == ["row", "text"]
    else:
        assert list(lines[0])[:3] == ["row", name, "text"] and [line[name] for line in lines] == ids


def test_bad_rows_are_named_or_left_out(models, tmp_path, capsys):
    rows = [{"id": str(n), "text": text} for n, text in enumerate(["good", "", "the film", "  ", "bad"])]
    words = {"model": models / "single/best", "file": write_csv(tmp_path / "new.csv", rows)}
    with pytest.raises(
        UserError, match=r"2 of 5 rows.*text is empty: row 1;.*white space: row 3;.*on_bad_rows"
    ):
        predict(**words, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = predict(**words, folder=tmp_path / "out", on_bad_rows="drop")
    assert [(line["row"], line["id"], line["text"]) for line in lines] == [
        (0, "0", "good"), (2, "2", "the film"), (4, "4", "bad"),
    ]  # fmt: skip
    assert "dropped 2 of 5 rows" in capsys.readouterr().out


def test_a_sample_comes_in_input_order(models, tmp_path):
    file = write_csv(tmp_path / "new.csv", [{"text": row["text"]} for row in make_rows(60)])
    lines = predict(models / "single/best", file, tmp_path / "out", max_predict_samples=20)
    rows = [line["row"] for line in lines]
    assert len(set(rows)) == 20 and rows == sorted(rows) and rows != list(range(20))


def test_labelled_rows_keep_their_scores_and_get_their_ids(models, tmp_path):
    rows = [{"id": n, **row} for n, row in enumerate(make_rows(30), start=100)]
    words = {"model_name_or_path": models / "single/best", "output_dir": tmp_path / "out"}
    words |= {"test_file": write_csv(tmp_path / "new.csv", rows), "predictions_format": "parquet"}
    assert score_here(**words) == EXIT_DONE
    lines = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert [(line["id"], line["label"]) for line in lines] == [(str(r["id"]), r["label"]) for r in rows]
    results = json.loads((tmp_path / "out/results.json").read_text())
    right = np.mean([line["prediction"] == line["label"] for line in lines])
    assert results["test/accuracy"] == pytest.approx(right)
    assert all("id" not in line for line in results["test/worst_errors"])  # as after training


def test_what_is_said_in_a_folder_is_of_its_last_evaluation(
    models, kinds, reviews, tmp_path, monkeypatch, capsys
):
    """With two, `--compare` could take the predictions of one for those made with the other's options."""
    source, file = unlabelled(kinds, reviews, "single", tmp_path / "new.jsonl", drop=True)
    words = {"model_name_or_path": models / "single/best", "output_dir": tmp_path / "out"}

    def left():
        return {path.name for path in (tmp_path / "out").iterdir()}

    assert score_here(**words, test_file=source) == EXIT_DONE
    assert left() == {"predictions.jsonl", "report.html", "results.json"}
    assert score_here(**words, test_file=source, predictions_format="csv") == EXIT_DONE
    with pytest.raises(UserError, match=r"was evaluated again since predictions.jsonl was written"):
        find_predictions(tmp_path / "out", None)
    capsys.readouterr()
    predict(models / "single/best", file, tmp_path / "out")
    assert left() == {"predictions.csv", "predictions.jsonl"}
    assert "from an earlier evaluation: results.json, report.html, predictions" in capsys.readouterr().out
    predict(models / "single/best", file, tmp_path / "out")  # as a month later, on other texts
    assert "from an earlier evaluation: predictions.jsonl\n" in capsys.readouterr().out
    monkeypatch.setattr("ft.page.write_page", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        score_here(**words, test_file=source)
    assert left() == {"predictions.csv", "predictions.jsonl"}


def test_what_no_evaluation_has_left_in_a_folder_stays(models, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("report.html", "results.json"):
        (tmp_path / "out" / name).write_text("of the user")
    file = write_csv(tmp_path / "new.csv", [{"text": "so good"}])
    for _ in range(2):  # predictions beside them do not make them results of an evaluation
        predict(models / "single/best", file, tmp_path / "out")
    for name in ("report.html", "results.json"):
        assert (tmp_path / "out" / name).read_text() == "of the user"
    rows = write_csv(tmp_path / "scored.csv", make_rows(6))
    words = {"model_name_or_path": models / "single/best", "test_file": rows}
    with pytest.raises(UserError, match=r"holds a results.json that no evaluation wrote"):
        score_here(**words, output_dir=tmp_path / "out")


@pytest.mark.parametrize("is_labelled", [True, False])
def test_two_evaluations_do_not_write_into_one_folder_at_once(models, tmp_path, monkeypatch, is_labelled):
    monkeypatch.setattr("ft.output.LOCK_SECONDS", 0.1)
    rows = make_rows(6) if is_labelled else [{"text": row["text"]} for row in make_rows(6)]
    words = {"model_name_or_path": models / "single/best", "test_file": write_csv(tmp_path / "a.csv", rows)}
    with held(tmp_path / "out"), pytest.raises(UserError, match="another run is writing to"):
        score_here(**words, output_dir=tmp_path / "out")
    assert score_here(**words, output_dir=tmp_path / "out") == EXIT_DONE
    assert ".lock" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_what_only_scores_need_is_not_asked_for_and_is_said_to_do_nothing(models, tmp_path, capsys):
    file = write_csv(tmp_path / "new.csv", [{"text": "so good"}])
    predict(models / "single/best", file, tmp_path / "out", metrics="./gone", slice_columns="shop")
    said = "note: nothing is scored, so that metrics and slice_columns have no effect"
    assert said in capsys.readouterr().out


def test_data_is_not_replaced_by_its_own_evaluation(models, reviews, tmp_path):
    words = {"model_name_or_path": models / "single/best", "output_dir": tmp_path / "out"}
    words |= {"predictions_format": "csv"}
    assert score_here(**words, test_file=reviews / "test.csv") == EXIT_DONE
    before = (tmp_path / "out/predictions.csv").read_bytes()
    with pytest.raises(UserError, match=r"output_dir: '.*predictions.csv' is read as data, and would be"):
        score_here(**words, test_file=tmp_path / "out/predictions.csv")
    assert (tmp_path / "out/predictions.csv").read_bytes() == before


def test_a_pair_of_which_a_text_is_missing_is_not_taken_for_a_text(models, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"one": "a film", "text": "another"}\n')
    with pytest.raises(UserError, match=r"trained on 'two' and 'one', but the data has no column 'two'"):
        predict(models / "pairs/best", tmp_path / "new.jsonl", tmp_path / "out")


def test_an_evaluation_reads_the_columns_that_training_found(tiny_model, tmp_path):
    """From the test file alone, the text would be the title, and the label the stars."""
    for number, name in enumerate(("train", "validation", "test")):
        rows = [{"message": row["text"], "score": len(row["text"]) / 9} for row in make_rows(40, number)]
        more = {"title": "a film", "stars": 3} if name == "test" else {}
        write_csv(tmp_path / "data" / f"{name}.csv", [row | more for row in rows])
    words = {"model_name_or_path": tiny_model, "dataset_name": tmp_path / "data", "max_train_steps": 4}
    assert train_here(**words, output_dir=tmp_path / "run", save_strategy="no") == EXIT_DONE
    reported = json.loads((tmp_path / "run/results.json").read_text())["test/mse"]
    words = {"model_name_or_path": tmp_path / "run/best", "test_file": tmp_path / "data/test.csv"}
    assert score_here(**words, output_dir=tmp_path / "out") == EXIT_DONE
    assert json.loads((tmp_path / "out/results.json").read_text())["test/mse"] == pytest.approx(reported)


def test_a_text_column_may_have_the_name_of_ours(models, tmp_path):
    file = write_csv(tmp_path / "new.csv", [{"prediction": "the film was great"}])
    words = {"model_name_or_path": models / "scores/best", "test_file": file, "output_dir": tmp_path / "out"}
    assert score_here(**words, text_column_names="prediction", predictions_format="parquet") == EXIT_DONE
    (row,) = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert row["text"] == "the film was great" and isinstance(row["prediction"], float)


def test_the_revision_of_the_pretrained_model_is_none_of_the_folder_that_training_made_of_it(
    models, reviews, tmp_path
):
    """A config.yaml that names one still works for eval.py."""
    words = {
        "model_name_or_path": models / "single/best",
        "model_revision": "v2",
        "output_dir": tmp_path / "out",
    }
    assert score_here(**words, test_file=reviews / "test.csv") == EXIT_DONE


def test_a_test_file_is_scored_where_the_training_data_is_not(models, reviews, tmp_path):
    words = {"train_file": "gone.csv", "validation_file": tmp_path / "gone.csv"}
    predict(models / "single/best", reviews / "test.csv", tmp_path / "out", **words)
    assert json.loads((tmp_path / "out/results.json").read_text())["test/accuracy"] > 0


LINES = [{"id": 1, "text": "good", "two": "bad"}]
REFUSED = {
    "an id that is not there": (LINES, {"id_column_name": "key"}, ["id_column_name", "no column 'key'"]),
    "the text as id": (LINES, {"id_column_name": "text"}, ["id_column_name", "'text' is the"]),
    "a list as id": ([{"text": "a", "l": [1]}], {"id_column_name": "l"}, ["id_column_name", "list"]),
    "an id with a name of ours": ([{"text": "a", "row": 1}], {"id_column_name": "row"}, ["'row'", "rename"]),
    "labels in some rows": ([{"text": "a", "label": "good"}, {"text": "b"}], {}, ["label is missing: row 1"]),
    "two texts to choose from": ([{"a": "x", "b": "y"}], {}, ["text_column_names", "'a', 'b'"]),
    "suspects without labels": (LINES, {"suspected_label_errors": "true"}, ["suspected", "no row"]),
    "no rows": ([], {}, ["empty"]),
}  # fmt: skip


@pytest.mark.parametrize("rows, options, patterns", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(rows, options, patterns, models, tmp_path):
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as refused:
        predict(models / "single/best", tmp_path / "new.jsonl", tmp_path / "out", **options)
    assert all(pattern in str(refused.value) for pattern in patterns), refused.value
    assert not list((tmp_path / "out").glob("*"))


def test_rows_of_parquet_are_written_a_group_at_a_time(models, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr("ft.prediction_files.GROUP_ROWS", 20)
    words = {"model_name_or_path": models / "single/best", "test_file": reviews / "test.csv"}
    assert score_here(**words, output_dir=tmp_path / "out", predictions_format="parquet") == EXIT_DONE
    file = pq.ParquetFile(tmp_path / "out/predictions.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [20, 20, 7]
    assert file.read()["row"].to_pylist() == list(range(47))


def test_csv_refuses_labels_that_hold_the_delimiter(models, kinds, reviews, tmp_path):
    _, file = unlabelled(kinds, reviews, "tags", tmp_path / "new.jsonl", drop=True)
    words = {"model": models / "tags/best", "file": file, "folder": tmp_path / "out", "label_delimiter": "o"}
    with pytest.raises(UserError, match=r"predictions_format: the label 'good' holds 'o'.*label_delimiter"):
        predict(**words, predictions_format="csv")
    assert not (tmp_path / "out").exists()
