"""A label column of any type: the kind that it calls for, its labels in order, what is refused and how it is
split."""

import json
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import write_csv
from hypothesis import given
from hypothesis import strategies as st
from prepared import Prepared, jsonl

from ft.config import Config
from ft.data.slices import read_slice_columns, slice_values
from ft.data.split import stratified
from ft.errors import UserError
from ft.tasks.text_classification import TextClassification
from ft.tasks.text_classification.multi_label import MultiLabel
from ft.tasks.text_classification.regression import Regression

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def made(tokenizer, tmp_path):
    """Prepared data for a column of labels, written as jsonl, or as csv if they are texts."""

    def make(labels, suffix="jsonl", task=None, **options):
        rows = [{"text": f"the film {i}", "label": label} for i, label in enumerate(labels)]
        path = tmp_path / f"t.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pa.table({"text": [r["text"] for r in rows], "label": labels}), path)
        else:
            (jsonl if suffix == "jsonl" else write_csv)(path, rows)
        options = {"validation_split_percentage": 0, **options}
        if task is None:
            chosen = {k: options.get(k) for k in ("problem_type", "label_delimiter") if k in options}
            task = TextClassification(**chosen)
        return Prepared(tokenizer, task=task, train_file=path, **options)

    return make


# --- the kind


@pytest.mark.parametrize(
    "labels, suffix, kind, reason",
    [
        (["a", "b"], "jsonl", SINGLE, "one name or whole number"),
        ([1, 2], "jsonl", SINGLE, "one name or whole number"),
        ([1.0, 2.0], "jsonl", SINGLE, "one name or whole number"),
        (["1.0", "2.0"], "csv", SINGLE, "one name or whole number"),
        ([True, False], "jsonl", SINGLE, "one name or whole number"),
        ([["a"], ["a", "b"], []], "jsonl", MULTI, "lists"),
        ([[1], [2, 3]], "jsonl", MULTI, "lists"),
        ([0.5, 1, 2], "jsonl", REGRESSION, "not all whole"),
        (["0.5", "1", "2"], "csv", REGRESSION, "not all whole"),
        (["-1e-3", "2"], "csv", REGRESSION, "not all whole"),
        ([pa.scalar(1.5).as_py(), 2.0], "parquet", REGRESSION, "not all whole"),
        (["1.5 stars", "2 stars"], "csv", SINGLE, "one name or whole number"),
    ],
)
def test_the_kind_is_inferred_and_said(made, labels, suffix, kind, reason):
    found = made(labels * 3, suffix)
    assert found.task.state()["problem_type"] == kind
    said = [note for note in found.notes if note.startswith("problem_type")]
    assert len(said) == 1 and kind in said[0] and "'label'" in said[0] and reason in said[0]


def test_the_kind_that_is_set_is_taken_and_nothing_is_inferred(made):
    found = made([0, 1, 2, 3], problem_type=REGRESSION)
    assert (
        found.task.state()["problem_type"] == REGRESSION and found.splits["train"].labels.dtype == np.float64
    )
    assert not any(note.startswith("problem_type") for note in found.notes)


def test_a_delimiter_asks_for_several_labels(made):
    found = made(["a|b", "", "b"], "csv", label_delimiter="|")
    assert found.task.state()["problem_type"] == MULTI
    assert found.labels("train") == [["a", "b"], [], ["b"]]


def test_labels_that_look_like_several_joined_ones_are_said(made):
    found = made(["a", "b", "a|b"] * 2, "csv")
    assert any("look like several ones with '|'" in n and "label_delimiter" in n for n in found.notes)
    assert not any(
        "look like several" in note for note in made(["red, dark", "red, light", "b"], "csv").notes
    )


def test_a_delimiter_that_stands_between_no_labels_is_said(made):
    found = made(["a", "b", "a;b"] * 2, "csv", label_delimiter=",")
    assert any(
        "look like several ones with ';'" in note and "label_delimiter" in note for note in found.notes
    )
    found = made([["a"], ["b"], ["a|b"]], label_delimiter="|")
    assert "label_delimiter: the label column 'label' holds lists, which '|' does not split" in found.notes
    assert found.names == ["a", "a|b", "b"]
    for notes in (made(["a;b", "b"], "csv", label_delimiter=";").notes, made([["a"], ["b"]]).notes):
        assert not any("label_delimiter:" in note for note in notes)


def test_a_second_run_from_the_cache_knows_the_kind(made):
    one, two = (made([0.5, 1.5, 2.5]) for _ in range(2))
    assert one.encoded == 3 and two.encoded == 0
    assert two.task.state() == one.task.state() and two.task.state()["mean"] == 1.5


@pytest.mark.parametrize(
    "labels, names",
    [
        (["+1", "-1"], ["-1", "+1"]),
        (["+1.0", "-1.0"], ["-1", "1"]),
        (["9" * 19, "1" * 20, "12"], ["12", "9" * 19, "1" * 20]),  # ids, some beyond 64 bits
        (["+1", "heart"], ["+1", "heart"]),  # beside names, what is not a plain number is a name
        (["9" * 20, "alice"], ["9" * 20, "alice"]),
    ],
)
def test_whole_numbers_of_a_table_may_have_any_sign_and_size(made, labels, names):
    assert made(labels, "csv").names == names


# --- several labels


@pytest.mark.parametrize(
    "labels, names",
    [
        ([["b", "a"], ["Z"], []], ["Z", "a", "b"]),
        ([[10, 9], [2], []], ["2", "9", "10"]),
        ([[" a "], ["a", "b"]], ["a", "b"]),
        ([["2023", "news"], ["news"]], ["2023", "news"]),
        ([[1.0], [2.0, 1.0]], ["1", "2"]),
    ],
)
def test_the_labels_and_their_order(made, labels, names):
    found = made(labels)
    assert found.names == names
    whole = [[str(int(x)) if isinstance(x, float) else str(x).strip() for x in row] for row in labels]
    assert found.labels("train") == [sorted(row, key=names.index) for row in whole]


def test_they_are_kept_as_a_byte_each(made):
    found = made([["a"], ["a", "b"], [], ["c"]])
    labels = found.splits["train"].labels
    assert labels.dtype == np.uint8 and labels.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_texts_with_a_delimiter_give_what_lists_give(made):
    lists = [["a", "b"], [], ["c"], ["b"]]
    listed = made(lists)
    joined = made([" ; ".join(labels) for labels in lists], "csv", label_delimiter=";")
    assert joined.names == listed.names and joined.labels("train") == listed.labels("train") == lists


def test_a_chunk_of_empty_lists_is_no_other_type(made, monkeypatch):
    import ft.data.tables

    monkeypatch.setattr(ft.data.tables, "ROWS_PER_CHUNK", 2)
    assert made([[], [], ["a"], ["b", "a"]]).labels("train") == [[], [], ["a"], ["a", "b"]]


def test_lists_of_classes_keep_the_order_of_the_classes(tokenizer, tmp_path):
    import datasets

    names = ["worst", "best", "absent"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = [{"text": f"a {i}", "label": label} for i, label in enumerate([[1], [0, 1], []])]
    listed = datasets.Dataset.from_list(rows, features=features)
    listed.save_to_disk(tmp_path / "saved")
    listed.to_parquet(tmp_path / "train.parquet")
    for source in ({"dataset_name": tmp_path / "saved"}, {"train_file": tmp_path / "train.parquet"}):
        found = Prepared(tokenizer, **source, validation_split_percentage=0)
        assert found.names == names and found.labels("train") == [["best"], ["worst", "best"], []]

    read_slice_columns(Config(train_file=str(tmp_path / "train.parquet"), slice_columns="label"), found.data)
    (tmp_path / "train.parquet").unlink()  # a run's training data is read at its start
    assert slice_values(found.data, "train", np.array([1, 2])) == {"label": [["worst", "best"], []]}


def test_a_label_twice_in_a_row_counts_once_and_is_said(made):
    found = made([["a", "a", "b"], ["b"], ["a"]])
    assert found.labels("train")[0] == ["a", "b"]
    assert any("1 labels occur twice" in note for note in found.notes)


def test_null_is_a_bad_row_and_an_empty_list_is_none(made):
    with pytest.raises(UserError, match=r"label is missing: row 2;"):
        made([["a"], [], None, ["b"]])
    kept = made([["a"], [], None, ["b"]], on_bad_rows="drop")
    assert kept.labels("train") == [["a"], [], ["b"]]


# --- numbers


@pytest.mark.parametrize("labels, suffix", [([0.5, 1, 3], "jsonl"), (["0.5", " 1", "3e0"], "csv")])
def test_numbers_are_kept_in_their_unit(made, labels, suffix):
    found = made(labels, suffix)
    assert found.splits["train"].labels.tolist() == [0.5, 1, 3] and found.names == ["label"]
    assert found.task.state()["mean"] == 1.5 and found.task.state()["std"] == pytest.approx(
        np.std([0.5, 1, 3])
    )


def test_the_mean_is_that_of_the_rows_that_are_trained_on(made):
    found = made([i + 0.5 for i in range(100)], validation_split_percentage=20, test_split_percentage=10)
    trained = found.splits["train"].labels
    assert len(trained) == 70 and found.task.state()["mean"] == trained.mean() != 50
    few = made([i + 0.5 for i in range(100)], max_train_samples=7)
    assert few.task.state()["std"] == few.splits["train"].labels.std()


# --- refused


REFUSED = {
    "a list of other types": ([["a"], "b"], {}, ["row 1", "'b'", "mixes types"]),
    "null in a list": ([["a"], [None, "b"]], {}, ["row 1", "null"]),
    "an empty name": ([["a"], ["", "b"]], {}, ["row 1", "empty name"]),
    "true and false for each label": (
        [[False, True], [False, False], [True, False]], {}, ["rows of false and true", r"\[2, 5\]"],
    ),
    "0 and 1 for each label": ([[0, 1], [1, 1], [1, 0]], {}, ["rows of 0 and 1", r"\[2, 5\]"]),
    "fractions in lists": ([[1.5], [2.0]], {}, ["row 0", "1.5", "no label"]),
    "lists of lists": ([[["a"]], [["b"]]], {}, ["lists of list", "names or whole numbers"]),
    "no label at all": ([[], []], {}, ["no label", "nothing to tell apart"]),
    "the same labels everywhere": ([["a", "b"]] * 3, {}, ["the same labels", "a, b"]),
    "lists for a single label": ([["a"], ["b"]], {"problem_type": SINGLE}, ["list", MULTI]),
    "names for several labels": (["a", "b"], {"problem_type": MULTI}, ["'a' in row 0", "label_delimiter"]),
    "numbers for several labels": ([1, 2], {"problem_type": MULTI}, ["int64", "list of labels", SINGLE]),
    "names for a regression": (["a", "b"], {"problem_type": REGRESSION}, ["rows 0, 1: found 'a'", SINGLE]),
    "lists for a regression": ([[1], [2]], {"problem_type": REGRESSION}, ["list", "expects numbers", SINGLE]),
    "switches for a regression": ([True, False], {"problem_type": REGRESSION}, ["bool", "expects numbers"]),
    "a name among numbers": ([0.5, 1.5, "n/a"], {}, ["row 2", "'n/a'", "expected a finite number"]),
    "infinity": ([0.5, 1.5, float("inf")], {}, ["row 2", "inf", "expected a finite number"]),
    "a mark for a missing value": (
        [0.5, 1.5, 1.797e308], {}, [r"row 2: found 1.797e\+308", "marks a missing value", "a larger unit"],
    ),
    "numbers that no float32 holds": (
        [-2.5e39, 1e39, 0.5], {}, [r"rows 0, 1: found -2.5e\+39, 1e\+39", r"at most 1e\+36 in size"],
    ),
    "such a mark beside a name": ([0.5, 1.5, "n/a", -1e308], {}, [r"rows 2, 3: found 'n/a', -1e\+308"]),
    "nan": ([0.5, float("nan"), 1.5], {}, ["label is nan: row 1", "on_bad_rows"]),
    "one number": ([0.5] * 4, {}, ["target 0.5", "nothing to learn"]),
    "fractions for one label": ([0.5, 1.5], {"problem_type": SINGLE}, ["row 0 holds 0.5", REGRESSION]),
}  # fmt: skip


@pytest.mark.parametrize("labels, options, patterns", REFUSED.values(), ids=REFUSED)
def test_labels_that_cannot_be_learned(made, labels, options, patterns):
    with pytest.raises(UserError) as error:
        made(labels, **options)
    assert "\n" not in str(error.value)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"no {pattern!r} in {error.value}"


@pytest.mark.parametrize(
    "text, found", [("n/a", "'n/a'"), ("nan", "'nan'"), ("1,5", "'1,5'"), ("inf", "'inf'")]
)
def test_a_text_that_is_no_number_is_named_with_its_row(made, text, found):
    with pytest.raises(UserError, match=f"row 3: found {found}"):
        made(["1.5", "2.5", "3", text], "csv")


@pytest.mark.parametrize("options", [{"label_delimiter": ","}, {"problem_type": MULTI}, {}])
def test_a_list_written_as_a_text_is_named(made, options):
    with pytest.raises(UserError, match=r"row 0 holds \"\['a', 'b'\]\", a list written as a text"):
        made(["['a', 'b']", "['a']", "[]"], "csv", **options)


def test_names_in_brackets_are_names_where_told_so(made):
    assert made(["[a]", "[b]"] * 3, "csv", problem_type=SINGLE).names == ["[a]", "[b]"]
    assert made(["[a]", "b"] * 3, "csv").names == ["[a]", "b"]


def test_whole_decimals_are_classes(tokenizer, tmp_path):
    """As databases export NUMERIC columns."""
    labels = pa.array([Decimal(n % 2) for n in range(20)], pa.decimal128(38, 9))
    table = pa.table({"text": [f"text {n}" for n in range(20)], "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    made = Prepared(tokenizer, train_file=tmp_path / "t.parquet", validation_split_percentage=0)
    assert made.task.label_names == ["0", "1"]


def test_an_unknown_label_among_several_is_named_with_its_rows(tokenizer, tmp_path):
    def rows(*labels):
        return [{"text": f"{labels[0]} {i}", "label": label} for i, label in enumerate(labels)]

    train = jsonl(tmp_path / "t.jsonl", rows(["a"], ["b", "a"], []))
    other = jsonl(tmp_path / "v.jsonl", rows(["a"], ["a", "c"], ["d", "c"]))
    for split in ("validation", "test"):
        said = (
            rf"{split} data: the label column 'label': rows 1, 2: found the label 'c', 'd', .*one of a, b\."
        )
        with pytest.raises(UserError, match=said):
            Prepared(tokenizer, train_file=train, **{f"{split}_file": other})


def test_labels_that_differ_in_case_alone_are_said(made):
    said = "WARNING labels: 'Good' and 'good' differ only in case, and are different labels"
    for labels, options in ((["Good", "good", "bad"], {}), ([["Good"], ["good", "bad"], ["bad"]], {})):
        prepared = made(labels * 2, "csv" if isinstance(labels[0], str) else "jsonl", **options)
        assert said in prepared.notes
    assert not any("only in case" in note for note in made(["Good", "bad"] * 2, "csv").notes)


def test_labels_that_look_like_missing_values_are_said(made):
    for missing in ("nan", "NULL", "#N/A"):
        for labels in (["good", missing], [["good", "bad"], ["bad", missing]]):
            notes = made(labels * 2, "csv" if isinstance(labels[0], str) else "jsonl").notes
            assert any(f"WARNING labels: {missing!r} looks like a missing value" in note for note in notes)
    assert not any("missing value" in note for note in made(["None", "NA"] * 2, "csv").notes)


@pytest.mark.parametrize(
    "others, shown",
    [
        (["New York", "New\xa0York"], r"'New York' and 'New\xa0York'"),
        (["New York", "new  york"], "'New York' and 'new  york'"),
        (["caf\xe9", "cafe\u0301"], r"'cafe\u0301' and 'caf\xe9'"),
    ],
)
def test_labels_that_look_alike_are_said(made, others, shown):
    """From files that several programs wrote, joined into one."""
    said = f"WARNING labels: {shown} differ only in case, spaces or the form of letters, and are different"
    notes = made([*others, "bad"] * 2, "csv").notes
    assert [note for note in notes if note.startswith(said)], notes


@pytest.mark.parametrize("known", [["LABEL_0", "LABEL_1"], ["NEGATIVE", "POSITIVE"]])
def test_of_a_model_made_elsewhere_the_labels_may_be_renamed(made, known):
    task = TextClassification(problem_type=SINGLE)
    task.load_state({"problem_type": SINGLE, "label_names": known})
    with pytest.raises(UserError, match=rf"'negative'.*one of {known[0]}.*id2label and label2id"):
        made(["negative", "positive"], task=task)


def test_a_test_row_that_is_no_number_does_not_question_the_kind(tokenizer, tmp_path):
    train = jsonl(tmp_path / "t.jsonl", [{"text": f"a {i}", "label": i / 4} for i in range(9)])
    test = jsonl(tmp_path / "v.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": "good"}])
    with pytest.raises(UserError, match=r"test data: .* row 1: found 'good', expected a finite") as error:
        Prepared(tokenizer, train_file=train, test_file=test)
    assert SINGLE not in str(error.value)


# --- splits


def test_rare_labels_are_split_in_proportion(made):
    labels = [["common"] if i % 10 else ["common", "rare"] for i in range(200)]
    parts = made(labels, validation_split_percentage=10)
    held = parts.labels("validation")
    assert len(held) == 20 and sum("rare" in row for row in held) == 2


def test_numbers_are_split_by_size(made):
    parts = made([i + 0.5 for i in range(200)], validation_split_percentage=10)
    held = parts.splits["validation"].labels
    assert len(held) == 20 and np.histogram(held, bins=10, range=(0, 200))[0].tolist() == [2] * 10


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=60))
def test_each_row_stands_in_the_stratum_of_its_rarest_label(rows):
    matrix = np.zeros((len(rows), 5), np.uint8)
    for place, labels in enumerate(rows):
        matrix[place, labels] = 1
    strata, counts = MultiLabel().strata(matrix), matrix.sum(0)
    first = np.where(matrix != 0, counts, len(rows) + 1).argmin(axis=1)  # the first of equally rare ones
    assert np.array_equal(strata, np.where(matrix.any(axis=1), first, 5))
    for place, stratum in enumerate(strata):
        own = np.flatnonzero(matrix[place])
        assert stratum == 5 if not len(own) else counts[stratum] == counts[own].min() and stratum in own
    parts = stratified(strata, {"validation": 20})
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(rows)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_bins_rise_with_the_number(numbers):
    bins = Regression().strata(np.array(numbers))
    order = np.argsort(numbers, kind="stable")
    assert np.all(np.diff(bins[order]) >= 0) and bins.max() < 10
    counts = np.bincount(bins)
    assert counts.max() - counts[counts > 0].min() <= 1


# --- options


WRONG = {
    "class_weights": ({"class_weights": "balanced"}, [MULTI, REGRESSION]),
    "pos_weight": ({"pos_weight": {"a": 2.0}}, [SINGLE, REGRESSION]),
    "focal_gamma": ({"focal_gamma": 2.0}, [REGRESSION]),
    "label_smoothing_factor": ({"label_smoothing": 0.1}, [MULTI, REGRESSION]),
    "threshold_mode": ({"threshold_mode": "global"}, [SINGLE, REGRESSION]),
    "label_delimiter": ({"label_delimiter": "|"}, [SINGLE, REGRESSION]),
}


@pytest.mark.parametrize("key", WRONG)
def test_an_option_of_another_kind_is_refused(key):
    options, kinds = WRONG[key]
    for kind in kinds:
        with pytest.raises(UserError, match=f"{key}: is for .*but this is {kind}; leave it out"):
            TextClassification(problem_type=kind, **options)
    for kind in {SINGLE, MULTI, REGRESSION} - set(kinds):
        TextClassification(problem_type=kind, **options)


def test_an_option_of_another_kind_is_refused_when_the_kind_is_inferred(made):
    with pytest.raises(UserError, match=r"class_weights: is for single_label_classification.*pos_weight"):
        made([["a"], ["b"]], task=TextClassification(class_weights="balanced"))


@pytest.mark.parametrize("key, kind", [("class_weights", SINGLE), ("pos_weight", MULTI)])
def test_weights_for_labels_that_do_not_exist(key, kind):
    task = TextClassification(problem_type=kind, **{key: {"a": 2.0, "x": 1.0, "y": 3.0}})
    task.kind.label_names = ["a", "b"]
    labels = np.array([0, 1]) if kind == SINGLE else np.eye(2, dtype=np.uint8)
    with pytest.raises(
        UserError, match=f"{key}: no training row has the labels 'x', 'y'; expected some of 'a', 'b'"
    ):
        task.row_weights(labels)


def test_json_stays_what_it_is():
    """The state of every kind survives JSON."""
    for kind, learned in (("single_label_classification", {}), (REGRESSION, {"mean": 0.1, "std": 1 / 3})):
        state = {"problem_type": kind, "label_names": ["a", "b"], **learned}
        task = TextClassification()
        task.load_state(json.loads(json.dumps(state)))
        assert task.state() == state and task.has_targets


def test_numbers_with_decimal_commas_are_not_taken_for_names(made):
    with pytest.raises(UserError, match=r"'0,25' and the like.*written with a point.*set label_delimiter"):
        made(["0,25", "3,50", "-1,00", "4"])
    names = made(["0,25", "3,50", "0,25"], problem_type="single_label_classification").names
    assert names == ["0,25", "3,50"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["sports"], ["sports", 2024]], r"row 0 holds 'sports' \(str\) and row 1 holds 2024 \(int\)"),
        ([[1], ["a"], [2]], r"row 0 holds 1 \(int\) and row 1 holds 'a' \(str\)"),
    ],
)
def test_lists_that_mix_names_and_numbers_are_told_which(made, labels, said):
    with pytest.raises(UserError, match=rf"mixes types: {said}.*labels of one type in the lists"):
        made(labels)


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["a", "b", "a", 3], ["a", "b"]), ([0, 1, 1, ""], ["0", "1"]), ([["a"], ["b"], [], "c"], ["a", "b"])],
)
def test_the_others_are_of_one_type_once_the_odd_row_is_dropped(tokenizer, tmp_path, labels, names):
    texts = ["one", "two", "three", None]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    data = Prepared(
        tokenizer, train_file=jsonl(tmp_path / "t.jsonl", rows), validation_split_percentage=0,
        on_bad_rows="drop",
    )  # fmt: skip
    assert data.task.label_names == names and len(data.splits["train"]) == 3


def test_numbers_and_names_are_classes_together_where_told_so(made, tmp_path, tokenizer):
    """Sizes: with a model that knows them, the test rows may also have both."""
    sizes = ["38", "M", "40", "M", "38", "40"]
    with pytest.raises(UserError, match=r"mixes numbers and names.*set problem_type: single_label"):
        made(sizes, "csv")
    data = made(sizes, "csv", problem_type=SINGLE)
    assert data.task.label_names == ["38", "40", "M"]
    known = TextClassification()
    known.load_state(data.task.state())
    scored = made(["M", "40"], "csv", task=known)
    assert scored.splits["train"].labels.tolist() == [2, 1]
    assert made([38, "M", 40], problem_type=SINGLE).task.label_names == ["38", "40", "M"]


def test_a_split_may_have_those_names_alone_that_look_like_numbers(tokenizer, tmp_path):
    for name, sizes in {"train": ["38", "38.5", "40.0", "M"], "test": ["40.0", "38.5"]}.items():
        write_csv(tmp_path / f"{name}.csv", [{"text": f"{name} {s}", "label": s} for s in sizes])
    data = Prepared(
        tokenizer, task=TextClassification(problem_type=SINGLE), dataset_name=tmp_path, problem_type=SINGLE,
        validation_split_percentage=0,
    )  # fmt: skip
    assert data.labels("test") == ["40.0", "38.5"]


def test_padded_numbers_that_are_all_written_alike_are_numbers(made):
    assert made(["01.0", "02.0", "1"], "csv").task.label_names == ["1", "2"]


def test_a_number_with_a_leading_zero_is_no_other_beside_one_with_a_point(made):
    with pytest.raises(UserError, match=r"mixes '01' with '2\.0'"):
        made(["01", "1", "2.0"], "csv")


@pytest.mark.parametrize("labels", [[["a"], ["b"]], ["a|b", "b"]])
def test_test_rows_without_any_label_are_not_scored(tokenizer, tmp_path, labels):
    """Lists that are all empty mean missing labels, as empty fields of a csv file do."""
    empty = [] if isinstance(labels[0], list) else ""
    train = [{"text": f"the film {i}", "label": label} for i, label in enumerate(labels)]
    test = [{"text": f"a book {i}", "label": empty} for i in range(2)]
    delimiter = {} if isinstance(labels[0], list) else {"label_delimiter": "|"}
    data = Prepared(
        tokenizer, task=TextClassification(problem_type=MULTI, **delimiter),
        train_file=jsonl(tmp_path / "a.jsonl", train), test_file=jsonl(tmp_path / "b.jsonl", test),
        validation_split_percentage=0, problem_type=MULTI, **delimiter,
    )  # fmt: skip
    assert "test" not in data.splits
    assert any("no row has a label" in note for note in data.notes)


def test_one_class_that_is_left_is_an_error_too(made, tmp_path, tokenizer):
    with pytest.raises(UserError, match="all have the label 'a'; there is nothing to tell apart"):
        made(["b"] + ["a"] * 29, max_train_samples=3)
    write_csv(tmp_path / "v.csv", [{"text": "the film 9", "label": "a"}, {"text": "new", "label": "b"}])
    with pytest.raises(UserError, match="all have the label 'a'"):
        made(["a"] * 9 + ["b"], "csv", validation_file=tmp_path / "v.csv", on_duplicates="drop")


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_validation_label_that_no_training_row_has_is_named_with_its_rows(tmp_path, tokenizer, kind):
    """For a ClassLabel, as for any other column."""
    write_classes(tmp_path, kind, {"train": [0, 1, 0, 1], "validation": [0, 2, 2]})
    with pytest.raises(UserError, match="validation data: rows 1, 2: found the label 'c', which no training"):
        Prepared(tokenizer, dataset_name=tmp_path)


def write_classes(folder, kind, splits):
    """Parquet files with a ClassLabel of three names, or with lists of it."""
    import datasets

    names, wrap = ["a", "b", "c"], (lambda label: label) if kind == "one" else (lambda label: [label])
    label = datasets.ClassLabel(names=names)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": label if kind == "one" else datasets.List(label)}
    )
    for split, labels in splits.items():
        rows = [{"text": f"{split} {row}", "label": wrap(number)} for row, number in enumerate(labels)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("kind", ["one", "several"])
def test_labels_that_no_training_row_has_are_said_of_the_splits_that_are_scored(tmp_path, tokenizer, kind):
    """Labels of a ClassLabel are known to the model whether a row has them or not."""
    write_classes(tmp_path, kind, {"train": [0, 1, 0, 1], "test": [0, 2, 2]})
    found = Prepared(tokenizer, dataset_name=tmp_path, validation_split_percentage=0)
    (note,) = [note for note in found.notes if "no training row" in note]
    assert note.startswith("WARNING test: ") and note.endswith("'c' (2)")


def test_labels_that_a_sample_of_the_training_rows_lacks_are_said(tmp_path, tokenizer):
    for split in ("train", "test"):
        lines = [f"{split} {number},{label}" for label in "abcdefgh" for number in range(10)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    few = Prepared(tokenizer, dataset_name=tmp_path, validation_split_percentage=0, max_train_samples=2)
    (note,) = [note for note in few.notes if "no training row" in note]
    assert "(10)" in note and note.endswith("and 1 more")
