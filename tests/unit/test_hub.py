"""Local copies of Hub repositories: shards, configurations, and files that were not fetched."""

from pathlib import Path

import pytest
from conftest import make_rows, write_csv

from ft.data.sources import find_sources
from ft.errors import UserError
from ft.options import DataOptions

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def found(folder, **options):
    return find_sources(DataOptions(dataset_name=str(folder), **options))


def texts(source):
    return source.read()["text"].to_pylist()


def put(path, text, rows=4):
    """A parquet file as on the Hub: its labels are a ClassLabel column, whose names it stores."""
    import datasets

    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["worst", "best"])}
    values = {"text": [f"{text} {i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(values, datasets.Features(features)).to_parquet(str(path))
    return path


@pytest.mark.parametrize("place", ["data", ".", "plain_text"])
def test_the_files_of_a_repository(tmp_path, place):
    put(tmp_path / place / "train-00000-of-00001.parquet", "learn")
    put(tmp_path / place / "test-00000-of-00001.parquet", "try")
    splits = found(tmp_path)
    assert set(splits) == {"train", "test"}
    assert texts(splits["train"])[0] == "learn 0" and texts(splits["test"])[0] == "try 0"
    assert splits["train"].class_names == {"label": ["worst", "best"]}


def test_all_shards_in_their_order(tmp_path):
    for number in range(3):
        put(tmp_path / "data" / f"train-{number:05}-of-00003.parquet", f"shard {number}", rows=2)
    put(tmp_path / "data" / "validation-00000-of-00001.parquet", "tune")
    splits = found(tmp_path)
    assert set(splits) == {"train", "validation"}
    assert texts(splits["train"]) == [f"shard {number} {row}" for number in range(3) for row in range(2)]


def test_a_missing_shard_is_named(tmp_path):
    for number in (0, 2):
        put(tmp_path / "data" / f"train-{number:05}-of-00004.parquet", "x")
    with pytest.raises(UserError, match=r"lacks 2 of the 4 files of train, train-00001-of-00004 the first"):
        found(tmp_path)


def test_a_missing_shard_of_older_names_and_a_link_to_nothing_are_named(tmp_path):
    put(tmp_path / "old" / "data" / "train-00000-of-00002-b42a775f407cee45.parquet", "x")
    with pytest.raises(UserError, match="lacks 1 of the 2 files of train, train-00001-of-00002 the first"):
        found(tmp_path / "old")
    put(tmp_path / "new" / "data" / "train-00000-of-00002.parquet", "x")
    (tmp_path / "new" / "data" / "train-00001-of-00002.parquet").symlink_to("gone")
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: is a broken link"):
        found(tmp_path / "new")


def test_a_copy_may_have_the_name_of_a_format(tmp_path, monkeypatch):
    """To `datasets`, "parquet" alone is its reader for whatever is in the working directory."""
    put(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet", "mine")
    put(tmp_path / "other" / "train-00000-of-00001.parquet", "another's")
    monkeypatch.chdir(tmp_path)
    assert texts(found(Path("parquet"))["train"]) == [f"mine {row}" for row in range(4)]


def test_the_layout_of_converted_repositories(tmp_path):
    put(tmp_path / "default" / "train" / "0000.parquet", "learn")
    put(tmp_path / "default" / "test" / "0000.parquet", "try")
    assert set(found(tmp_path)) == {"train", "test"}


def test_split_files_in_a_data_folder(tmp_path):
    for name in ("train", "test"):
        write_csv(tmp_path / "data" / f"{name}.csv", make_rows(6))
    assert set(found(tmp_path)) == {"train", "test"}


def test_csv_files_are_read_as_everywhere_else(tmp_path):
    """`datasets` would read the first label as missing, and the others as 7 and true."""
    rows = [{"text": "NA", "label": label} for label in ("None", "007", "True", "")]
    write_csv(tmp_path / "data" / "train-00000-of-00002.csv", rows[:2])
    write_csv(tmp_path / "data" / "train-00001-of-00002.csv", rows[2:])
    write_csv(tmp_path / "data" / "test-00000-of-00001.csv", rows)
    splits = found(tmp_path)
    assert set(splits) == {"train", "test"}
    for split in splits.values():
        assert split.read().to_pylist() == rows
    write_csv(tmp_path / "data" / "train-00001-of-00002.csv", [{"text": "a", "stars": "b"}])
    with pytest.raises(UserError, match=r"00001-of-00002.csv: has the columns text, stars, but train-00000"):
        found(tmp_path)["train"].read()


def test_what_datasets_cannot_read_is_said_with_its_reason(tmp_path):
    """Its own message names none."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    with pytest.raises(UserError, match=r"cannot be read by `datasets`.*(JSON|json|Expecting|row|line)"):
        found(tmp_path)


@pytest.mark.parametrize(("separator", "read"), [(",", "007"), (";", "7")])
def test_csv_files_of_which_the_readme_says_how_to_read_them(tmp_path, separator, read):
    """Only `datasets` knows everything that may be written there."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "reviews.csv").write_text(
        f"text{separator}label\na{separator}007\nb{separator}010\n"
    )
    how = "" if separator == "," else f"  sep: '{separator}'\n"
    card = f"configs:\n- config_name: small\n{how}  data_files:\n  - split: train\n    path: data/*.csv\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    table = found(tmp_path)["train"].read()
    assert table.column_names == ["text", "label"] and str(table["label"][0].as_py()) == read


@pytest.fixture
def two_configurations(tmp_path):
    put(tmp_path / "one" / "train-00000-of-00001.parquet", "one")
    put(tmp_path / "two" / "train-00000-of-00001.parquet", "two")
    put(tmp_path / "two" / "dev-00000-of-00001.parquet", "dev")
    return tmp_path


def test_one_of_several_configurations(two_configurations):
    assert texts(found(two_configurations, dataset_config_name="two")["train"])[0] == "two 0"
    assert set(found(two_configurations, dataset_config_name="one")) == {"train"}
    for options in ({}, {"dataset_config_name": "three"}):
        with pytest.raises(UserError, match=r"dataset_config_name: .*configurations one, two"):
            found(two_configurations, **options)


def test_configurations_of_the_readme(two_configurations):
    (two_configurations / "README.md").write_text(
        "---\nconfigs:\n- config_name: both\n  default: true\n  data_files:\n"
        "  - {split: train, path: one/train-*}\n  - {split: test, path: two/train-*}\n---\n# A card\n"
    )
    splits = found(two_configurations)
    assert set(splits) == {"train", "test"} and texts(splits["test"])[0] == "two 0"
    with pytest.raises(UserError, match=r"cannot be read by `datasets`.*'three'.*both"):
        found(two_configurations, dataset_config_name="three")


def test_a_folder_without_configurations_says_so(tmp_path):
    import datasets

    write_csv(tmp_path / "train.csv", make_rows(6))
    with pytest.raises(UserError, match=r"dataset_config_name: .*no configurations; leave it out"):
        found(tmp_path, dataset_config_name="small")
    datasets.Dataset.from_list(make_rows(6)).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        UserError, match=r"dataset_config_name: .*not a copy of a Hub repository.*leave it out"
    ):
        found(tmp_path / "saved", dataset_config_name="small")


def test_a_file_whose_name_says_no_split_is_not_taken_for_training(tmp_path):
    write_csv(tmp_path / "reviews.csv", make_rows(6))
    with pytest.raises(UserError, match=r"no training split 'train'; it holds: reviews\.csv"):
        found(tmp_path)


@pytest.mark.parametrize("names", [["Train.csv", "Test.csv"], ["data/TRAIN.csv", "data/Valid.csv"]])
def test_a_name_in_capitals_is_no_split_as_it_is_none_to_datasets(tmp_path, names):
    """`datasets` then takes all files for training, including those of the test rows."""
    for name in names:
        write_csv(tmp_path / name, make_rows(6))
    with pytest.raises(UserError, match="no training split 'train'; it holds"):
        found(tmp_path)


def test_files_that_datasets_would_score_as_one_are_named(tmp_path):
    for name in ("train", "eval", "test"):
        write_csv(tmp_path / "data" / f"{name}.csv", make_rows(6))
    with pytest.raises(UserError, match=r"holds data/eval\.csv and data/test\.csv, which `datasets` takes"):
        found(tmp_path)


def test_shards_are_of_the_split_that_they_name(tmp_path):
    for split in ("train", "eval", "test"):
        put(tmp_path / "data" / f"{split}-00000-of-00001.parquet", split)
    splits = found(tmp_path, validation_split_name="eval")
    assert {name: texts(source)[0] for name, source in splits.items()} == {
        "train": "train 0", "validation": "eval 0", "test": "test 0",
    }  # fmt: skip


def test_a_text_file_beside_the_data_is_no_class(tmp_path):
    put(tmp_path / "data" / "train-00000-of-00001.parquet", "learn")
    (tmp_path / "data" / "classes.txt").write_text("worst\nbest\n")
    assert texts(found(tmp_path)["train"])[0] == "learn 0"


def test_a_file_that_was_not_fetched_from_git_lfs(tmp_path):
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text(POINTER)
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
        found(tmp_path)
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
        find_sources(DataOptions(train_file=str(path)))["train"].read()


def test_names_of_classes_in_a_parquet_or_arrow_file(tmp_path):
    import datasets
    import pyarrow as pa

    path = put(tmp_path / "train.parquet", "x")
    source = find_sources(DataOptions(train_file=str(path)))["train"]
    assert source.class_names == {"label": ["worst", "best"]}
    table = datasets.load_dataset("parquet", data_files=str(path))["train"].data.table
    table = table.set_column(1, table.schema.field("label"), pa.chunked_array([[1, 0, -1, 0]]))
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    source = find_sources(DataOptions(train_file=str(tmp_path / "t.arrow")))["train"]
    assert source.class_names == {"label": ["worst", "best"]}
    assert source.read()["label"].to_pylist() == [1, 0, None, 0]  # -1 stands for no label
