"""Bad input: one clear line that names the key or the row, what was found, what was expected and the remedy,
before any training, and leaving nothing on disk."""

import gzip
import json
import re
import shutil
import time

import pytest
from conftest import FORK, ONE, flags, launch, make_rows, train_here, write_csv

HEADER = "text,label\n"
ROWS = "the film was great,good\nthe book was awful,bad\n" * 10  # lines 2 to 21, rows 0 to 19


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = {"text": "the film was great", "label": "good"}
BAD = {"text": "the book was awful", "label": "bad"}


@pytest.fixture
def refused(capsys, base_flags):
    """The message with which a run is refused."""
    from ft.errors import UserError

    def run(exists=True, **values):
        values = {key: value for key, value in {**base_flags, **values}.items() if value is not None}
        existed = exists and values["output_dir"].exists()
        capsys.readouterr()
        try:
            code = train_here(**values)
            pytest.fail(f"the run was not refused, it ended with {code}")
        except UserError as error:
            message = f"error: {error}"
        except SystemExit as error:
            assert error.code == 2
            message = capsys.readouterr().err.strip()
        assert message.startswith("error: ") and len(message.splitlines()) == 1, message
        assert not exists or values["output_dir"].exists() == existed
        return message

    return run


def assert_says(message, patterns):
    for pattern in patterns:
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"


FILES = {
    "0 bytes": ("t.csv", b"", ["t.csv", "empty"]),
    "header only": ("t.csv", HEADER.encode(), ["t.csv", "no rows"]),
    "blank lines only": ("t.csv", b"\n\n\n", ["t.csv", "empty", "header"]),
    "empty jsonl": ("t.jsonl", b"\n\n", ["t.jsonl", "no rows"]),
    "empty json array": ("t.json", b"[]", ["t.json", "no rows"]),
    "empty gz": ("t.csv.gz", gzip.compress(b""), ["t.csv.gz", "empty"]),
    "unknown suffix": ("t.xlsx", b"x", ["train_file", r"t\.xlsx", "csv", "parquet"]),
    "no suffix": ("rows", b"x", ["train_file", "csv, tsv, json"]),
    "not UTF-8": (
        "t.csv",
        (HEADER + ROWS).encode() + "café,good\n".encode("latin-1"),
        ["line 22", "0xe9", "UTF-8"],
    ),
    "UTF-16": ("t.csv", (HEADER + ROWS).encode("utf-16"), ["line 1", "UTF-8"]),
    "not UTF-8, jsonl": ("t.jsonl", lines(GOOD, BAD) + b'{"text": "caf\xe9"}\n', ["line 3", "UTF-8"]),
    "not UTF-8, gz": ("t.csv.gz", gzip.compress(HEADER.encode() + b"caf\xe9,good\n"), ["line 2", "UTF-8"]),
    "too many fields": (
        "t.csv",
        (HEADER + ROWS + "well, not bad,good\n").encode(),
        ["line 22", "3 fields", "expected 2", "text, label", "quote"],
    ),
    "too few fields": ("t.csv", (HEADER + ROWS + "well\n").encode(), ["line 22", "1 field", "expected 2"]),
    "unterminated quote": (
        "t.csv",
        (HEADER + ROWS + '"well,good\n' + ROWS).encode(),
        ["line(s)? 22", "quote", "clos|unterminated"],
    ),
    "text behind a quote": ("t.csv", (HEADER + '"well" said,good\n' + ROWS).encode(), ["line 2", "quote"]),
    "NUL bytes": ("t.csv", (HEADER + ROWS).encode() + b"a\0b,good\n", ["line 22", "NUL"]),
    "another delimiter": ("t.csv", ROWS.replace(",", ";").encode(), ["line 1", "one column", "','", "';'"]),
    "another delimiter, quoted": (
        "t.csv",
        b'"text";"label"\n"a; b";"good"\n',
        ["line 1", "one column", "separated by ','", "not by ';'"],
    ),
    "tabs in a csv": (
        "t.csv",
        (HEADER + ROWS).replace(",", "\t").encode(),
        ["one column", "separated by ','", r"\.tsv"],
    ),
    "a pointer of Git LFS": (
        "t.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
        ["t.parquet", "git lfs pull"],
    ),
    "nested without end": ("t.json", b"[" * 100_000, ["t.json", "nested too deeply"]),
    "a JSON line nested without end": ("t.jsonl", b'{"a":' * 100_000, ["t.jsonl", "nested too deeply"]),
    "a class for every row": (
        "t.csv",
        (HEADER + "".join(f"film {i},c{i}\n" for i in range(30))).encode(),
        ["validation_split_percentage", "30 classes", "only one of its class", "validation_file", "to 0"],
    ),
    "a column twice": ("t.csv", ("text,label,text\n" + "a,b,c\n" * 9).encode(), ["'text'", "twice"]),
    "broken JSON line": (
        "t.jsonl",
        lines(GOOD, BAD) + b'{"text": "a", \n',
        ["line 3", "broken JSON", "object"],
    ),
    "a JSON line of another kind": ("t.jsonl", lines(GOOD, BAD, ["a", "b"]), ["line 3", "list", "object"]),
    "broken JSON array": ("t.json", b'[{"text": "a",\n "label": }]', ["line 2", "broken JSON"]),
    "a JSON array of texts": ("t.json", b'["a", "b"]', ["row 0", "str", "object"]),
    "corrupt parquet": ("t.parquet", b"PAR1 nothing else", ["t.parquet", "parquet", "again"]),
    "corrupt arrow": ("t.arrow", b"ARROW1 nothing else", ["t.arrow", "arrow", "again"]),
    "no gzip file": ("t.csv.gz", (HEADER + ROWS).encode(), ["t.csv.gz", "gzip"]),
    "half a gzip file": (
        "t.csv.gz",
        gzip.compress((HEADER + ROWS * 99).encode())[:-20],
        ["t.csv.gz", "gzip"],
    ),
    "single class": (
        "t.csv",
        (HEADER + "a good film,good\n" * 20).encode(),
        ["label", "single class", "good", "two"],
    ),
    "integers and strings": (
        "t.jsonl",
        lines(GOOD, BAD, {"text": "so so", "label": 3}),
        ["'label'", "mixes types", "row 2", "3", "int"],
    ),
    "numbers and names": (
        "t.csv",
        (HEADER + ROWS + "so so,3\n").encode(),
        ["'label'", "row 20", "'3'", "one type"],
    ),
    "a name among float labels": (
        "t.jsonl",
        lines(*[{"text": "a", "label": 1.0}, {"text": "b", "label": 2.5}] * 9, {"text": "c", "label": "n/a"}),
        ["'label'", "row 18", "'n/a'", "expected a finite number"],
    ),
    "the same list everywhere": (
        "t.jsonl",
        lines(*[{"text": "a", "label": [1]}] * 9),
        ["'label'", "same labels", "nothing to tell apart"],
    ),
    "numbers as text": (
        "t.jsonl",
        lines(*[{"text": 1, "label": "a"}] * 9),
        ["text_column_names", "int64|text"],
    ),
    "null text": (
        "t.jsonl",
        lines(GOOD, BAD, {"text": None, "label": "good"}, {"label": "bad"}),
        ["train data", "2 of 4 rows", "text is null: rows 2, 3", "on_bad_rows: drop"],
    ),
    "empty and blank text": (
        "t.csv",
        (HEADER + ROWS + ",good\n  \u3000,bad\n").encode(),
        ["2 of 22", "text is empty: row 20", "white space: row 21", "on_bad_rows"],
    ),
    "missing label": (
        "t.csv",
        (HEADER + ROWS + "so so,\n").encode(),
        ["label is missing: row 20", "on_bad_rows"],
    ),
    "many bad rows": (
        "t.csv",
        (HEADER + ROWS + ",good\n" * 5000).encode(),
        ["5,000 of 5,020", "20, 21", "more"],
    ),
    "no text column": (
        "t.jsonl",
        lines(*[{"a": "x", "b": "y", "label": 1}] * 9),
        ["text_column_names", "'?a'?, '?b'?"],
    ),
    "no label column": (
        "t.jsonl",
        lines(*[{"text": "x", "z": "y"}] * 9),
        ["label_column_name", "'?text'?, '?z'?"],
    ),
}


@pytest.mark.parametrize("name, content, patterns", FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_trained_on(refused, tmp_path, name, content, patterns):
    (tmp_path / name).write_bytes(content)
    message = refused(dataset_name=None, train_file=tmp_path / name)
    assert_says(message, patterns)


def test_parquet_with_bytes_that_are_no_text(refused, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([b"great", b"caf\xe9", b"poor"] * 9).view(pa.string())
    pq.write_table(pa.table({"text": text, "label": ["a", "b", "c"] * 9}), tmp_path / "t.parquet")
    message = refused(dataset_name=None, train_file=tmp_path / "t.parquet")
    assert_says(message, ["'text'", "row 1 ", "UTF-8"])


def test_a_column_of_another_type_is_named_with_its_type(refused, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": pa.array([b"a", b"b"] * 9), "label": ["a", "b"] * 9})
    pq.write_table(table, tmp_path / "t.parquet")
    message = refused(dataset_name=None, train_file=tmp_path / "t.parquet")
    assert_says(message, ["text_column_names", r"'text' \(binary\)"])


@pytest.mark.parametrize(
    "name", ["prediction", "probabilities", "label", "row", "error", "confidence", "label_quality"]
)
def test_a_text_of_a_pair_with_the_name_of_what_results_hold_beside_it(refused, tmp_path, name):
    (tmp_path / "t.jsonl").write_bytes(lines(*[{"one": "a film", name: "it was good", "y": "a"}] * 20))
    words = {"text_column_names": f"one,{name}", "label_column_name": "y"}
    message = refused(dataset_name=None, train_file=tmp_path / "t.jsonl", **words)
    assert_says(message, ["text_column_names", f"'{name}' is reserved", "rename it"])


VALUES = {
    "missing file": ({"dataset_name": None, "train_file": "no.csv"}, ["train_file", r"no\.csv", "not exist"]),
    "missing folder": ({"dataset_name": "./no/where"}, ["dataset_name", "./no/where", "not exist"]),
    "no data at all": ({"dataset_name": None}, ["no training data", "dataset_name or train_file"]),
    "missing validation file": ({"validation_file": "no.csv"}, ["validation_file", r"no\.csv", "not exist"]),
    "wrong text column": (
        {"text_column_names": "txt"},
        ["text_column_names", "'txt'", "'?text'?, '?label'?"],
    ),
    "wrong label column": ({"label_column_name": "y"}, ["label_column_name", "'y'", "'?text'?, '?label'?"]),
    "one column for both": (
        {"label_column_name": "text", "text_column_names": "text"},
        ["label_column_name", "text"],
    ),
    "three text columns": ({"text_column_names": "a,b,c"}, ["text_column_names", "3", "one or two"]),
    "wrong split": ({"validation_split_name": "dev2"}, ["validation_split_name", "dev2", r"train\.csv"]),
    "a validation split and a file": (
        {"validation_split_name": "validation", "validation_file": "v.csv"},
        ["validation_split_name and validation_file are both set", "keep one"],
    ),
    "a test split and a file": (
        {"test_split_name": "test", "test_file": "t.csv"},
        ["test_split_name and test_file are both set", "keep one"],
    ),
    "a revision of a folder": (
        {"model_revision": "v2"},
        ["model_revision: found 'v2'", "is a folder, which has no revisions", "leave it out"],
    ),
    "test split as validation": (
        {"validation_split_name": "test", "test_split_name": "test"},
        ["validation_split_name", "test"],
    ),
    "no validation row": (
        {"dataset_name": None, "validation_split_percentage": 0.1},
        ["validation_split_percentage", "no row", "raise"],
    ),
    "no validation row of several labels": (
        {"dataset_name": None, "validation_split_percentage": 0.1, "label_delimiter": "|"},
        ["validation_split_percentage", "no row", "raise"],
    ),
    "no training row": (
        {"validation_split_percentage": 100},
        ["validation_split_percentage", "100", "below 100"],
    ),
    "package that is not installed": (
        {"dataset_name": "pkg:no_such_package/data"},
        ["no_such_package", "not installed", "pip install"],
    ),
    "nothing there in a package": (
        {"dataset_name": "pkg:json/nothing"},
        ["pkg:json/nothing", "holds no", "nothing"],
    ),
    "unknown metric": ({"metrics": "acuracy"}, ["metrics", "acuracy", "f1_macro"]),
    "unknown best metric": ({"metric_for_best_model": "f1"}, ["metric_for_best_model", "'f1'", "f1_macro"]),
    "unknown scheduler": ({"lr_scheduler_type": "liner"}, ["lr_scheduler_type", "liner", "linear", "cosine"]),
    "unknown strategy": ({"eval_strategy": "epochs"}, ["eval_strategy", "epochs", "epoch"]),
    "unknown key": ({"learning_rat": 1}, ["'learning_rat'", "did you mean 'learning_rate'"]),
    "unknown tracker": ({"report_to": "wandbb"}, ["report_to", "'wandbb'", "wandb, tensorboard"]),
    "rate nan": ({"learning_rate": "nan"}, ["learning_rate", "nan"]),
    "rate infinite": ({"learning_rate": "inf"}, ["learning_rate", "inf"]),
    "rate beyond floats": ({"learning_rate": "1e400"}, ["learning_rate", "inf"]),
    "rate zero": ({"learning_rate": 0}, ["learning_rate", "found 0", "above 0"]),
    "rate negative": ({"learning_rate": -1e-3}, ["learning_rate", "-0.001", "above 0"]),
    "rate below polynomial's end": (
        {"learning_rate": 1e-8, "lr_scheduler_type": "polynomial"},
        ["learning_rate", "1e-08", "polynomial", "raise it"],
    ),
    "a batch beyond all numbers": (
        {"global_batch_size": 10**30},
        ["global_batch_size", "up to 2,147,483,647"],
    ),
    "batch sizes whose product is": (
        {"per_device_train_batch_size": 10**9, "gradient_accumulation_steps": 10**9},
        ["per_device_train_batch_size x gradient_accumulation_steps", "up to 2,147,483,647"],
    ),
    "a text in the place of a file": (
        {"dataset_name": None, "train_file": "the film " * 50},
        ["not a file or folder name"],
    ),
    "rate of letters": ({"learning_rate": "fast"}, ["learning_rate", "fast", "number|float"]),
    "epochs negative": ({"num_train_epochs": -1}, ["num_train_epochs", "-1", "above 0"]),
    "epochs beyond floats": ({"num_train_epochs": "1e400"}, ["num_train_epochs", "inf"]),
    "batch zero": ({"global_batch_size": 0}, ["global_batch_size", "found 0", "above 0"]),
    "batch of a half": ({"global_batch_size": 1.5}, ["global_batch_size", r"1\.5", "int|whole"]),
    "clip nan": ({"max_grad_norm": "nan"}, ["max_grad_norm", "nan"]),
    "decay infinite": ({"weight_decay": "1e999"}, ["weight_decay", "inf"]),
    "seed beyond torch's generators": ({"seed": 10**22}, ["seed", "0000", "4,294,967,296"]),
    "seed negative": ({"seed": -1}, ["seed", "-1", "0 or more"]),
    "warmup_ratio 1.5": ({"warmup_ratio": 1.5}, ["warmup_ratio", r"1\.5", "0 to below 1"]),
    "warmup longer than training": ({"warmup_steps": 99}, ["warmup_steps", "99", "14 updates", "lower"]),
    "warmup longer than max_train_steps": (
        {"warmup_steps": 9, "max_train_steps": 5},
        ["warmup_steps", "9", "max_train_steps = 5"],
    ),
    "max_length too large": ({"max_length": 65}, ["max_length", "65", "3 to 64"]),
    "max_length too small": ({"max_length": 2}, ["max_length", "found 2", "3 to 64"]),
    "max_length too small for a pair": (
        {
            "max_length": 4,
            "text_column_names": "premise,hypothesis",
            "train_file": "PAIRS",
            "dataset_name": None,
        },
        ["max_length", "found 4", "at least 5", "pair"],
    ),
    "max_time": ({"max_time": "soon"}, ["max_time", "'soon'", "11h30m"]),
    "batch sizes that contradict each other": (
        {"global_batch_size": 32, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        ["global_batch_size", "32", "gradient_accumulation_steps is 2", "leave it out"],
    ),
    "no model": ({"model_name_or_path": None}, ["model_name_or_path", "not set"]),
    "model nowhere": ({"model_name_or_path": "./no/model"}, ["model_name_or_path", "./no/model", "folder"]),
    "config_overrides unknown": ({"config_overrides": "droput=0"}, ["config_overrides", "droput"]),
    "config_overrides broken": (
        {"config_overrides": "dropout"},
        ["config_overrides", "dropout", "name=value"],
    ),
    "a dropout of 1": (
        {"config_overrides": "hidden_dropout_prob=1"},
        ["config_overrides", "a dropout of 1,", "from 0 to below 1"],
    ),
    "a dropout of 1 in attention": (
        {"config_overrides": "attention_probs_dropout_prob=1"},
        ["config_overrides", "a dropout of 1,", "from 0 to below 1"],
    ),
    "checkpoint that is not there": (
        {"resume_from_checkpoint": "no/where"},
        ["resume_from_checkpoint", "no/where"],
    ),
}


@pytest.mark.parametrize("values, patterns", VALUES.values(), ids=VALUES)
def test_a_value_that_cannot_be(refused, values, reviews, tmp_path, patterns):
    if (
        "dataset_name" in values
        and values["dataset_name"] is None
        and "validation_split_percentage" in values
    ):
        values = {**values, "train_file": reviews / "train.csv"}
    if values.get("train_file") == "PAIRS":
        rows = [
            {"premise": row["text"], "hypothesis": "it is", "label": row["label"]} for row in make_rows(40)
        ]
        values = {**values, "train_file": write_csv(tmp_path / "pairs.csv", rows)}
    assert_says(refused(**values), patterns)


def test_a_label_in_validation_that_training_lacks_is_named_with_its_rows(refused, tmp_path):
    rows = make_rows(20)
    rows[3]["label"] = rows[17]["label"] = "grand"
    message = refused(validation_file=write_csv(tmp_path / "v.csv", rows))
    assert_says(message, ["validation data", "rows 3, 17", "'grand'", "bad, fine, good"])


def test_bad_rows_can_be_dropped_and_are_counted(base_flags, tmp_path, capsys):
    rows = make_rows(60)
    rows[4]["text"], rows[8]["text"], rows[9]["label"] = "", " \t ", ""
    rows[10]["text"] = rows[10]["label"] = ""
    values = {**base_flags, "train_file": write_csv(tmp_path / "t.csv", rows), "on_bad_rows": "drop"}
    del values["dataset_name"]
    assert train_here(**values) == 0
    out = capsys.readouterr().out
    assert_says(out, ["dropped 4 of 60 rows", "empty: 2", "white space: 1", "label is missing: 2"])


# --- the model


def copy_without(model, tmp_path, *names):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for name in names:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    "removed, patterns",
    [
        (["config.json"], ["model_name_or_path", r"config\.json"]),
        (["model.safetensors"], ["model_name_or_path", "weights", r"model\.safetensors"]),
        (["tokenizer.json"], ["model_name_or_path", "tokenizer", "set tokenizer_name"]),
    ],
    ids=["config", "weights", "tokenizer"],
)
def test_a_model_folder_that_lacks_something(refused, tiny_model, tmp_path, removed, patterns):
    assert_says(refused(model_name_or_path=copy_without(tiny_model, tmp_path, *removed)), patterns)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_a_model_folder_with_a_torn_file(refused, tiny_model, tmp_path, name):
    folder = copy_without(tiny_model, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert_says(refused(model_name_or_path=folder), ["model_name_or_path", re.escape(str(folder))])


@pytest.mark.parametrize(
    "key, name",
    [
        ("model_name_or_path", "no-such/model"),
        ("dataset_name", "no-such/data"),
        ("tokenizer_name", "no-such"),
    ],
)
def test_a_name_that_is_neither_a_folder_nor_on_a_hub_within_reach(refused, key, name):
    begin = time.monotonic()
    assert_says(refused(**{key: name}), [key, f"'{name}'", "(?i)offline|connect|cached|network|reach|Hub"])
    assert time.monotonic() - begin < 20


# --- the output folder


def test_an_output_dir_that_holds_a_run(base_flags, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "environment.json").write_text("{}")
    message = refused()
    assert_says(
        message,
        ["output_dir", "holds a run", "config.yaml", "resume_from_checkpoint", "overwrite_output_dir"],
    )
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"


def test_an_output_dir_that_is_a_file(refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_says(refused(), ["output_dir", "is a file", "folder"])
    assert (tmp_path / "run").read_text() == "mine"


def test_an_output_dir_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_says(refused(output_dir=tmp_path / "file" / "run"), ["output_dir", "file"])


def test_an_output_dir_that_cannot_be(refused, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in {"link": "is a broken link", "x" * 300: "too long", "a\0b": "null byte"}.items():
        message = refused(output_dir=tmp_path / name, exists=False)
        assert_says(message, ["output_dir", said])


# --- YAML


@pytest.mark.parametrize(
    "content, patterns",
    [
        (None, [r"c\.yaml", "No such file"]),
        ("", [r"c\.yaml", "key: value"]),
        ("- seed: 1\n", [r"c\.yaml", "key: value"]),
        ("seed: [1\n", [r"c\.yaml", "not plain YAML", "line"]),
        ("seed: !!python/object/apply:os.getpid []\n", [r"c\.yaml", "python/object"]),
        ("seeed: 1\n", ["'seeed'", r"c\.yaml", "did you mean 'seed'"]),
        ("seed: soon\n", ["seed", "soon"]),
        ("seed: 1.5\n", ["seed", r"1\.5"]),
        ("learning_rate: .nan\n", ["learning_rate", "nan"]),
        ("num_train_epochs: .inf\n", ["num_train_epochs", "inf"]),
        ("learning_rate: null\n", ["learning_rate"]),
        ("learning_rate: {a: 1}\n", ["learning_rate"]),
        ("help: true\n", ["help"]),
        ("1: 2\n", ["'1'", r"c\.yaml"]),
    ],
)
def test_a_config_file_that_is_none(refused, tmp_path, content, patterns):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    # Without the flags that would take precedence.
    assert_says(refused(config=tmp_path / "c.yaml", learning_rate=None, num_train_epochs=None), patterns)


# --- for real


@pytest.mark.parametrize("case", ["typing error", "wrong column", "bad row", "no weights"])
def test_the_script_prints_one_line_and_exits_with_2(base_flags, tiny_model, tmp_path, case):
    values = dict(base_flags)
    if case == "typing error":
        values["learning_rat"], said = 1, "did you mean 'learning_rate'"
    elif case == "wrong column":
        values["label_column_name"], said = "stars", "label_column_name"
    elif case == "bad row":
        rows = make_rows(20)
        rows[3]["text"] = ""
        del values["dataset_name"]
        values["train_file"], said = write_csv(tmp_path / "t.csv", rows), "row 3"
    else:
        values["model_name_or_path"] = copy_without(tiny_model, tmp_path, "model.safetensors")
        said = "no weights"
    done = launch(ONE if case in ("typing error", "no weights") else FORK, flags(**values))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert not values["output_dir"].exists()
