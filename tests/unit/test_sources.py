"""Where data comes from: files, folders, saved `datasets`, packages and the Hub, and which split is which."""

import gzip
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import make_rows, write_csv
from prepared import Prepared

from ft.data.sources import choose_split, find_sources, local_path
from ft.errors import UserError
from ft.options import DataOptions


def sources(**options):
    return find_sources(DataOptions(**{key: str(value) for key, value in options.items()}))


def texts_of(source):
    return source.read()["text"].to_pylist()


def write_split(folder, name, text):
    return write_csv(folder / name, [{"text": f"{text} {i}", "label": "ab"[i % 2]} for i in range(3)])


def write_classes(folder, text):
    for label in ("bad", "good"):
        (folder / label).mkdir(parents=True)
        for i in range(2):
            (folder / label / f"{i}.txt").write_text(f"{text} {label} {i}", encoding="utf-8")
    return folder


# --- files and folders of files


def test_files_are_the_splits_that_their_flags_say(tmp_path):
    train = write_split(tmp_path, "anything.csv", "one")
    found = sources(train_file=train, test_file=write_split(tmp_path, "other.csv", "two"))
    assert list(found) == ["train", "test"]
    assert texts_of(found["test"])[0] == "two 0"


def test_a_folder_of_files(tmp_path):
    for name in ("train", "dev", "test"):
        write_split(tmp_path, f"{name}.csv", name)
    found = sources(dataset_name=tmp_path)
    assert {split: texts_of(source)[0] for split, source in found.items()} == {
        "train": "train 0", "validation": "dev 0", "test": "test 0",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
def test_names_of_the_validation_split(tmp_path, name):
    write_split(tmp_path, "train.csv", "x")
    write_split(tmp_path, f"{name}.csv", "y")
    assert set(sources(dataset_name=tmp_path)) == {"train", "validation"}


def test_a_file_beside_a_folder_takes_the_place_of_its_split(tmp_path):
    write_split(tmp_path / "data", "train.csv", "x")
    write_split(tmp_path / "data", "validation.csv", "y")
    found = sources(dataset_name=tmp_path / "data", validation_file=write_split(tmp_path, "mine.csv", "mine"))
    assert texts_of(found["validation"])[0] == "mine 0"


def test_two_files_of_one_split_are_refused(tmp_path):
    write_split(tmp_path, "train.csv", "x")
    write_split(tmp_path, "train.tsv", "x")
    with pytest.raises(UserError, match=r"train\.csv and train\.tsv both hold 'train'"):
        sources(dataset_name=tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"no training split 'train'.*nothing.*train\.csv"):
        sources(dataset_name=tmp_path)


# --- the test split is for testing


def test_the_test_split_is_never_the_validation_split(tmp_path):
    write_split(tmp_path, "train.csv", "x")
    write_split(tmp_path, "test.csv", "y")
    assert set(sources(dataset_name=tmp_path)) == {"train", "test"}


def test_a_test_split_that_is_named_as_validation_is_no_test_split_any_more(tmp_path):
    write_split(tmp_path, "train.csv", "x")
    write_split(tmp_path, "test.csv", "y")
    found = sources(dataset_name=tmp_path, validation_split_name="test")
    assert "test" not in found and texts_of(found["validation"])[0] == "y 0"


def test_splits_by_the_users_names(tmp_path):
    for name in ("fold1", "fold2", "test", "validation"):
        write_split(tmp_path, f"{name}.csv", name)
    found = sources(dataset_name=tmp_path, train_split_name="fold1", test_split_name="fold2")
    assert {split: texts_of(source)[0] for split, source in found.items()} == {
        "train": "fold1 0", "validation": "validation 0", "test": "fold2 0",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"validation_split_name.*'fold3'.*fold1\.csv"):
        sources(dataset_name=tmp_path, validation_split_name="fold3")


def test_the_split_to_score_is_the_test_split_where_there_is_one(tmp_path):
    write_split(tmp_path, "train.csv", "x")
    options = DataOptions(dataset_name=str(tmp_path))
    assert choose_split(options, find_sources(options)) == "validation"  # set aside
    write_split(tmp_path, "test.csv", "y")
    assert choose_split(options, find_sources(options)) == "test"


# --- folders of texts


def test_a_folder_of_class_folders(tmp_path):
    write_classes(tmp_path, "ein schöner")
    (tmp_path / "bad" / "notes.md").write_text("no row")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "0.txt").write_text("no class")
    rows = sources(train_file=tmp_path)["train"].read().to_pylist()
    assert [(row["text"], row["label"], row["file"]) for row in rows] == [
        ("ein schöner bad 0", "bad", "bad/0.txt"),
        ("ein schöner bad 1", "bad", "bad/1.txt"),
        ("ein schöner good 0", "good", "good/0.txt"),
        ("ein schöner good 1", "good", "good/1.txt"),
    ]
    assert list(sources(dataset_name=tmp_path)) == ["train"]


def test_what_is_no_text_in_class_folders_is_left_out_and_counted(tmp_path, tokenizer, own_cache):
    for name in ("good/a.txt", "good/b.TXT", "bad/c.txt", "bad/d.md", "bad/2023/e.txt", "bad/.f", "g.md"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    prepared = Prepared(tokenizer, train_file=tmp_path / "texts", validation_split_percentage=0)
    assert sorted(prepared.texts("train")) == ["bad/c.txt", "good/a.txt", "good/b.TXT"]
    (note,) = [note for note in prepared.notes if "left out" in note]
    assert note.startswith("train: 2 files are left out") and "e.txt, ..." in note
    (tmp_path / "texts/bad/d.md").unlink()  # encoded before
    again = Prepared(tokenizer, train_file=tmp_path / "texts", validation_split_percentage=0)
    assert again.encoded == 0 and "train: 1 file is left out" in again.notes[0]


def test_texts_of_class_folders_may_be_gzipped(tmp_path):
    write_classes(tmp_path, "ein schöner")
    plain = sources(train_file=tmp_path)["train"].read()
    for path in tmp_path.glob("*/0.txt"):
        (path.parent / "0.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = sources(train_file=tmp_path)["train"]
    assert zipped.notes == [] and zipped.read().drop(["file"]) == plain.drop(["file"])
    for broken in (b"no gzip", gzip.compress(b"text" * 99)[:20]):
        (tmp_path / "bad/0.txt.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"0\.txt\.gz: is not a whole gzip file"):
            zipped.read()


def test_a_folder_of_files_that_is_named_as_a_file_is_told_its_place(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\n")
    with pytest.raises(UserError, match="a folder of data files is named as dataset_name"):
        sources(train_file=tmp_path)


def test_a_text_that_is_a_link_to_nothing_is_said(tmp_path):
    """Such as one that git-annex has not fetched; it does not count as a missing text."""
    write_classes(tmp_path, "ein")
    (tmp_path / "good" / "2.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"2\.txt.*No such file"):
        sources(train_file=tmp_path)["train"].fingerprint()


def test_train_and_test_folders_of_class_folders(tmp_path):
    write_classes(tmp_path / "train", "learn")
    write_classes(tmp_path / "test", "try")
    found = sources(dataset_name=tmp_path)
    assert set(found) == {"train", "test"} and texts_of(found["test"])[0] == "try bad 0"


def test_a_text_that_is_not_utf8_is_a_row_without_a_text(tmp_path):
    write_classes(tmp_path, "x")
    (tmp_path / "bad" / "1.txt").write_bytes(b"caf\xe9")
    assert texts_of(sources(train_file=tmp_path)["train"]) == ["x bad 0", None, "x good 0", "x good 1"]


@pytest.mark.parametrize("odd", ["caf\udce9/0.txt", "good/caf\udce9.txt"])
def test_a_class_or_a_text_whose_name_is_not_utf8_is_named(tmp_path, odd):
    """As in a Windows archive unpacked on Linux."""
    write_classes(tmp_path, "x")
    (tmp_path / odd).parent.mkdir(exist_ok=True)
    (tmp_path / odd).write_text("a text")
    for option in ("train_file", "dataset_name"):
        with pytest.raises(UserError, match=r"train_file: the name '.*caf\\udce9.*is not UTF-8.*rename it"):
            sources(**{option: tmp_path})


# --- saved `datasets`


def labelled(rows, names):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    return datasets.Dataset.from_list(rows, features=features)


def test_saved_datasets_keep_the_order_of_their_class_names(tmp_path):
    import datasets

    names = ["worst", "best", "absent"]
    train = labelled(
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": -1}], names
    )
    datasets.DatasetDict(train=train, test=train).save_to_disk(tmp_path / "saved")
    found = sources(dataset_name=tmp_path / "saved")
    assert set(found) == {"train", "test"}
    assert found["train"].class_names == {"label": names}
    assert found["train"].read()["label"].to_pylist() == [1, 0, None]  # -1 means no label
    assert found["train"].notes == []


def test_splits_of_saved_datasets_that_are_not_taken_are_said(tmp_path):
    import datasets

    one = labelled([{"text": "a", "label": 1}, {"text": "b", "label": 0}], ["worst", "best"])
    splits = dict.fromkeys(("train", "validation_matched", "validation_mismatched"), one)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (note,) = sources(dataset_name=tmp_path / "saved")["train"].notes
    assert "left out: validation_matched, validation_mismatched (validation_split_name and" in note
    chosen = sources(dataset_name=tmp_path / "saved", validation_split_name="validation_matched")
    assert "left out: validation_mismatched (" in chosen["train"].notes[0] and len(chosen) == 2


def test_one_saved_split_is_the_training_split(tmp_path):
    labelled([{"text": "a", "label": 1}], ["x", "y"]).save_to_disk(tmp_path / "saved")
    assert list(sources(dataset_name=tmp_path / "saved")) == ["train"]


def test_saved_splits_are_named_one_by_one(tmp_path):
    names = ["x", "y"]
    for number, split in enumerate(("train", "validation", "test")):
        labelled([{"text": split, "label": number % 2}], names).save_to_disk(tmp_path / split)
    found = sources(**{f"{split}_file": tmp_path / split for split in ("train", "validation", "test")})
    assert {split: texts_of(source) for split, source in found.items()} == {split: [split] for split in found}
    assert found["test"].class_names == {"label": names}
    assert found["train"].fingerprint() == sources(dataset_name=tmp_path / "train")["train"].fingerprint()
    next((tmp_path / "test").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"test_file: .* is not a whole saved"):
        sources(test_file=tmp_path / "test")["test"].read()


def test_saved_rows_that_were_shuffled_come_in_their_new_order(tmp_path):
    rows = [{"text": str(i), "label": i % 2} for i in range(20)]
    dataset = labelled(rows, ["x", "y"]).shuffle(seed=1)
    dataset.save_to_disk(tmp_path / "saved")
    assert texts_of(sources(dataset_name=tmp_path / "saved")["train"]) == dataset["text"][:]


def test_half_of_saved_datasets_is_refused(tmp_path):
    labelled([{"text": "a", "label": 1}], ["x", "y"]).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="not a whole saved"):
        sources(dataset_name=tmp_path / "saved")["train"].read()


# --- packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "some_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    write_split(folder / "data", "train.csv", "shipped")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_data_of_an_installed_package_which_is_not_imported(package):
    found = sources(dataset_name="pkg:some_package/data")
    assert texts_of(found["train"])[0] == "shipped 0"
    assert texts_of(sources(train_file="pkg:some_package/data/train.csv")["train"])[0] == "shipped 0"
    assert "some_package" not in sys.modules


def test_what_is_not_there_in_a_package(package):
    assert local_path("pkg:some_package") == package
    with pytest.raises(UserError, match=r"holds no 'nothing' \(looked in"):
        sources(dataset_name="pkg:some_package/nothing")
    for name in ("pkg:no_such_package/data", "pkg:", "pkg:/data", "pkg:no.such.package/data"):
        with pytest.raises(UserError, match="not installed"):
            sources(dataset_name=name)


# --- the Hub


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` returns what the test puts here; calls are recorded."""
    import datasets

    calls, splits = [], {}

    def load_dataset(*words, **options):
        calls.append((words, options))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, splits


def test_a_name_that_is_no_folder_is_a_hub_id(hub):
    calls, splits = hub
    splits["train"] = labelled([{"text": "a", "label": 1}, {"text": "b", "label": 0}], ["x", "y"])
    splits["test"] = labelled([{"text": "c", "label": 1}], ["x", "y"])
    splits["unsupervised"] = labelled([{"text": "d", "label": -1}], ["x", "y"])
    found = sources(dataset_name="owner/reviews", dataset_config_name="small")
    assert calls == [(("owner/reviews", "small"), {})]
    assert set(found) == {"train", "test"} and texts_of(found["train"]) == ["a", "b"]
    assert found["train"].class_names == {"label": ["x", "y"]}


def test_a_hub_data_set_is_known_by_its_rows(hub):
    _, splits = hub
    prints = []
    for text in "aba":
        splits["train"] = labelled([{"text": text, "label": 1}], ["x", "y"])
        prints.append(sources(dataset_name="owner/reviews")["train"].fingerprint())
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("name", ["./reviews", "/no/reviews", "~/no/reviews", "a/b/c", "reviews.csv"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(hub, name):
    calls, _ = hub
    with pytest.raises(UserError, match="does not exist"):
        sources(dataset_name=name)
    assert calls == []


# --- fingerprints


def test_a_fingerprint_depends_on_the_bytes_and_not_on_the_place(tmp_path):
    one = write_csv(tmp_path / "a" / "x.csv", make_rows(5))
    two = write_csv(tmp_path / "b" / "y.csv", make_rows(5))
    other = write_csv(tmp_path / "b" / "z.csv", make_rows(5, seed=1))
    prints = [sources(train_file=path)["train"].fingerprint() for path in (one, two, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_fingerprint_of_class_folders_depends_on_the_names_of_the_classes(tmp_path):
    one, two = write_classes(tmp_path / "a", "x"), write_classes(tmp_path / "b", "x")
    assert sources(train_file=one)["train"].fingerprint() == sources(train_file=two)["train"].fingerprint()
    (two / "good").rename(two / "great")
    assert sources(train_file=one)["train"].fingerprint() != sources(train_file=two)["train"].fingerprint()


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pa, "table", None)
    assert list(sources(train_file=write_split(tmp_path, "t.csv", "x"))) == ["train"]


def test_other_data_files_of_a_folder_are_said_to_be_left_out(tmp_path):
    for name in ("train.csv", "test.csv", "eval.csv", "Validation.csv", ".hidden.csv", "notes.md"):
        write_split(tmp_path, name, "x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = sources(dataset_name=tmp_path)
    assert set(found) == {"train", "test"}
    (note,) = found["train"].notes
    assert note.startswith("WARNING dataset_name: 2 files are left out") and "Validation.csv, ..." in note
    assert sources(dataset_name=tmp_path, validation_split_name="eval")["train"].notes[0].count("1 file is")
    (tmp_path / "Validation.csv").unlink()
    assert sources(dataset_name=tmp_path, validation_file=tmp_path / "eval.csv")["train"].notes == []


def test_other_class_folders_of_a_folder_are_said_to_be_left_out(tmp_path, monkeypatch):
    for split in ("train", "eval", ".old"):
        write_classes(tmp_path / split, split)
    found = sources(dataset_name=tmp_path)
    assert set(found) == {"train"}
    (note,) = found["train"].notes
    assert note.startswith("WARNING dataset_name: 4 files are left out") and "eval/bad" in note

    theirs = Path.iterdir

    def closed(folder):
        if folder.name == "eval":
            raise PermissionError(13, "Permission denied")
        return theirs(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    assert sources(dataset_name=tmp_path)["train"].notes == []


def test_what_may_not_be_entered_is_one_message(tmp_path, monkeypatch):
    write_classes(tmp_path, "x")

    def closed(path):
        if path.name == "good":
            raise PermissionError(13, "Permission denied", str(path))
        return path_iterdir(path)

    path_iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(UserError, match=r"good: cannot be read: Permission denied"):
        sources(train_file=tmp_path)
    with pytest.raises(UserError, match=r"'~nobody-of-this-name/x\.csv' does not exist"):
        sources(train_file="~nobody-of-this-name/x.csv")
