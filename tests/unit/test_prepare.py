"""From rows to encoded splits: encoded once, with the right labels, stratified, nothing silent."""

import copy
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT, all_ended, make_rows, write_csv
from hypothesis import given
from hypothesis import strategies as st
from prepared import Prepared, jsonl
from transformers import BertTokenizer

from ft import heap
from ft.config import Config
from ft.data import encode, encoder, prepare, workers
from ft.data.audit import has_labels
from ft.data.encoder import Encoder
from ft.data.pieces import Cut
from ft.data.prepare import cache_root
from ft.data.slices import read_slice_columns, slice_values
from ft.data.split import sample, stratified
from ft.durable import write_manifest
from ft.errors import UserError
from ft.tasks.text_classification import TextClassification

pytestmark = pytest.mark.usefixtures("own_cache")


# --- encoding


def test_rows_are_encoded_as_the_tokenizer_does_and_padded_on_the_right(tokenizer, reviews):
    made = Prepared(tokenizer, dataset_name=reviews)
    rows = make_rows(203)
    split = made.splits["train"]
    assert made.texts("train") == [row["text"] for row in rows]
    assert made.labels("train") == [row["label"] for row in rows] and split.row.tolist() == list(range(203))
    some = np.array([200, 3, 77])
    expected = tokenizer([rows[i]["text"] for i in some], padding=True, return_tensors="np")
    padded = split.padded(some, tokenizer.pad_token_id)
    for name in ("input_ids", "attention_mask"):
        assert np.array_equal(padded[name], expected[name])
    assert split.lengths[some].tolist() == expected["attention_mask"].sum(1).tolist()


HELD = """
import os, sys
import pyarrow as pa
from ft.config import Config
from ft.data.sources import find_sources
from ft.data.usable import usable_splits
from ft.tasks import build_task

pool = pa.proxy_memory_pool(pa.default_memory_pool())
pa.set_memory_pool(pool)
config = Config(model_name_or_path="-", train_file=sys.argv[1])
tables, *_ = usable_splits(config, build_task(config), find_sources(config), None, None)
print(pool.max_memory() / sum(table["text"].nbytes for table in tables.values()), flush=True)
os._exit(0)  # the arrays end after their pool
"""


def test_texts_are_held_twice_at_most_while_they_are_read_and_checked(tmp_path):
    """With rows set aside, which splits them; four times before `chosen` and `text_marks`."""
    rows = [{"text": f"{row} " + "word " * 100, "label": "ab"[row % 2]} for row in range(12_000)]
    path = write_csv(tmp_path / "all.csv", rows)
    done = subprocess.run([sys.executable, "-c", HELD, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) < 2.5, done.stderr


ENCODED = """
import os, sys, tracemalloc
from pathlib import Path
import pyarrow as pa
from tqdm import tqdm
from transformers import AutoTokenizer
from ft.data.columns import Columns
from ft.data.encode import encode
from ft.data.pieces import Cut

if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    pools = []  # the arrays end before them
    for batches in (8, 32):
        table = pa.table({"text": ["great lovely " * 30] * 1024 * batches})
        pools.append(pa.proxy_memory_pool(pa.default_memory_pool()))
        pa.set_memory_pool(pools[-1])
        tracemalloc.start()
        columns, bar = Columns(("text",), ""), tqdm(disable=True)
        encode(table, columns, tokenizer, Cut(64), Path(sys.argv[2]), int(sys.argv[3]), bar)
        print(tracemalloc.get_traced_memory()[1] + pools[-1].max_memory(), flush=True)
        tracemalloc.stop()
    os._exit(0)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_encoded_goes_to_the_disk_as_it_comes(tiny_model, tmp_path, workers):
    """Four times the rows take no more memory besides their texts."""
    (tmp_path / "script.py").write_text(ENCODED)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tiny_model, tmp_path / "encoded.arrow", str(workers)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    few, many = map(int, done.stdout.split()) if done.returncode == 0 else pytest.fail(done.stderr)
    assert many < 1.2 * few, done.stderr


def test_the_tokens_of_all_splits_are_known(tokenizer, tmp_path):
    words, files = {"train": "great", "validation": "lovely", "test": "superb"}, {}
    for split, word in words.items():
        rows = [{"text": f"{first} {word}", "label": first} for first in ("a", "the")]
        files[f"{split}_file"] = write_csv(tmp_path / f"{split}.csv", rows)
    known = Prepared(tokenizer, **files).data.tokens
    assert known.tolist() == sorted(tokenizer("a the great lovely superb")["input_ids"])


def test_a_tokenizer_may_give_numbers_beyond_its_length(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda _: 5)
    train = write_csv(tmp_path / "t.csv", [{"text": "great", "label": "a"}, {"text": "the", "label": "b"}])
    known = Prepared(tokenizer, train_file=train, validation_split_percentage=0).data.tokens
    assert known.tolist() == sorted(tokenizer("great the")["input_ids"])


def test_an_encoding_that_does_not_say_its_tokens_is_made_anew_in_its_place(tokenizer, reviews):
    """One from an older version."""
    first = Prepared(tokenizer, dataset_name=reviews)
    folder = cache_root() / first.data.fingerprint
    known = json.loads((folder / "data.json").read_text())
    del known["tokens"]
    (folder / "data.json").write_text(json.dumps(known))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    again = Prepared(tokenizer, dataset_name=reviews)
    assert again.encoded == first.encoded > 0 and again.data.fingerprint == first.data.fingerprint
    assert again.data.tokens.tolist() == first.data.tokens.tolist()
    assert Prepared(tokenizer, dataset_name=reviews).encoded == 0


def test_what_is_cut_is_known(tokenizer, reviews):
    whole, cut = (Prepared(tokenizer, length, dataset_name=reviews).splits["train"] for length in (64, 12))
    assert np.array_equal(cut.full_lengths, whole.lengths) and whole.lengths.max() > 12
    assert np.array_equal(cut.lengths, np.minimum(whole.lengths, 12))
    longest = int(whole.lengths.argmax())
    text = cut.table["text"][longest].as_py()
    expected = tokenizer(text, truncation=True, max_length=12)["input_ids"]
    assert cut.padded(np.array([longest]), 0)["input_ids"][0].tolist() == expected


KINDS = ["around", "around, cut at the left", "behind", "nowhere", "python"]


class ItsOwnWay(BertTokenizer):
    """Fast, but called differently from the others."""

    def _encode_plus(self, *args, **kwargs):
        return super()._encode_plus(*args, **kwargs)


def of_kind(kind, tokenizer):
    """A tokenizer that puts special tokens around a text (`tokenizer`, cut at either end), after it or
    nowhere, or one in Python; or `tokenizer` with something special."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    if kind == "python":
        return ByT5Tokenizer()
    if kind == "its own way":
        return ItsOwnWay(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer))
    if kind == "special tokens are text":
        made = copy.deepcopy(tokenizer)
        made.split_special_tokens = True
        return made
    if kind in ("around", "around, cut at the left"):
        made = copy.deepcopy(tokenizer)
        made.truncation_side = "right" if kind == "around" else "left"
        return made
    bytes_of_text = ByteLevelBPETokenizer()
    bytes_of_text.train_from_iterator([row["text"] for row in make_rows(50)], 300, special_tokens=["</s>"])
    if kind == "behind":
        bytes_of_text._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bytes_of_text._tokenizer, eos_token="</s>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_pair", [False, True])
def test_texts_are_truncated_as_the_tokenizer_itself_does_it(tokenizer, kind, is_pair):
    made = of_kind(kind, tokenizer)
    texts = [row["text"] * (1 + place % 3) for place, row in enumerate(make_rows(30))] + ["", "a", "[SEP]"]
    columns = [texts, texts[::-1]] if is_pair else [texts]
    for max_length in (5, 12, 40):
        expected = made(*columns, truncation=True, max_length=max_length)["input_ids"]
        found = Encoder(copy.deepcopy(made), len(columns), Cut(max_length))(columns)
        assert found["input_ids"].to_pylist() == expected
        whole = [len(ids) for ids in made(*columns)["input_ids"]]
        assert found["full_length"].to_pylist() == whole and max(whole) > max_length
        assert found["cut"].to_pylist() == [length > max_length for length in whole]


@pytest.mark.parametrize("long_text", ["head_tail", "windows"])
def test_where_a_tokenizer_truncates_matters_to_truncation_alone(tokenizer, long_text):
    texts = [[row["text"] * 3 for row in make_rows(30)]]
    right, left = (
        Encoder(of_kind(kind, tokenizer), 1, Cut(12, long_text, 9))(texts)
        for kind in ("around", "around, cut at the left")
    )
    assert right == left and max(right["full_length"].to_pylist()) > 12


def test_pairs_have_token_types_and_are_cut_at_the_longer_text(tokenizer, tmp_path):
    rows = [
        {"one": "the film was great", "two": "it was", "label": "a"},
        {"one": "the book", "two": " ".join(["awful"] * 50), "label": "b"},
    ] * 5
    made = Prepared(
        tokenizer, 20, train_file=write_csv(tmp_path / "t.csv", rows), text_column_names="one,two",
        validation_split_percentage=0,
    )  # fmt: skip
    expected = tokenizer(
        [rows[0]["one"], rows[1]["one"]], [rows[0]["two"], rows[1]["two"]], truncation=True, max_length=20,
        padding=True, return_tensors="np",
    )  # fmt: skip
    padded = made.splits["train"].padded(np.array([0, 1]), tokenizer.pad_token_id)
    assert set(padded) == {"input_ids", "token_type_ids", "attention_mask"}
    for name, values in padded.items():
        assert np.array_equal(values, expected[name]), name
    assert set(padded["token_type_ids"].ravel()) == {0, 1}


@pytest.mark.parametrize("long_text", ["truncate", "windows"])
def test_many_batches_give_the_same_as_one(tokenizer, reviews, monkeypatch, long_text):
    options = {"dataset_name": reviews, "long_text": long_text, "overwrite_cache": True}
    one = Prepared(tokenizer, 12, **options)
    monkeypatch.setattr(encode, "ROWS_PER_BATCH", 7)
    many = Prepared(tokenizer, 12, **options)
    met = {token for rows in one.splits.values() for ids in rows.table["input_ids"] for token in ids.as_py()}
    assert one.data.tokens.tolist() == many.data.tokens.tolist() == sorted(met)
    assert many.encoded == one.encoded == 203 + 61 + 47
    for split, rows in one.splits.items():
        assert rows.table.equals(many.splits[split].table.combine_chunks())


@pytest.mark.parametrize("kind", [*KINDS, "its own way", "special tokens are text"])
@pytest.mark.parametrize("how", ["texts", "windows", "pairs"])
def test_two_processes_give_the_same_as_one(tokenizer, tmp_path, monkeypatch, kind, how):
    """Also if special tokens in a text are split, which a tokenizer loses when it is pickled."""
    monkeypatch.setattr(encode, "ROWS_PER_BATCH", 16)
    made = of_kind(kind, tokenizer)
    rows = [row | {"text": row["text"] + " [SEP] good", "other": "a [SEP] b"} for row in make_rows(60)]
    options = {"train_file": write_csv(tmp_path / "t.csv", rows), "validation_split_percentage": 0}
    if how == "pairs":
        options["text_column_names"] = "text,other"
    else:
        options |= {"text_column_names": "text", "long_text": "windows" if how == "windows" else "truncate"}
    one, two = (
        Prepared(made, 12, **options, preprocessing_num_workers=count, overwrite_cache=True).splits["train"]
        for count in (1, 2)
    )
    assert one.table.equals(two.table) and len(one) == 60 and one.cut.any()
    if how == "texts":
        expected = made(rows[0]["text"], truncation=True, max_length=12)["input_ids"]
        assert two.padded(np.array([0]), 0)["input_ids"][0].tolist() == expected


@pytest.fixture
def processes(monkeypatch):
    """The processes that encode, each with its environment, as they are started."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, env, **kwargs):
            super().__init__(*args, env=env, **kwargs)
            self.env = env
            started.append(self)

    monkeypatch.setattr(workers.subprocess, "Popen", Popen)
    monkeypatch.setattr(encode, "ROWS_PER_BATCH", 16)
    return started


def test_many_texts_are_encoded_by_two_processes_with_a_plain_heap(
    tokenizer, reviews, monkeypatch, processes
):
    settings = [f"{name}={value}" for name, value in heap.SETTINGS.items()]
    monkeypatch.setenv(heap.TUNABLES, ":".join(["glibc.malloc.perturb=0", *settings]))
    monkeypatch.setattr(encoder, "cores", lambda: 8)
    few = Prepared(tokenizer, 12, dataset_name=reviews)
    assert not processes
    monkeypatch.setattr(encoder, "MANY_BYTES", 10_000)
    many = Prepared(tokenizer, 12, dataset_name=reviews, overwrite_cache=True)
    assert [one.env[heap.TUNABLES] for one in processes] == ["glibc.malloc.perturb=0"] * 2  # train; rest: few
    assert all(one.poll() is not None for one in processes)
    for split, rows in few.splits.items():
        assert rows.table.equals(many.splits[split].table)


@pytest.mark.parametrize("kind, many", [("around", 2), ("its own way", 2), ("python", 8)])
def test_a_tokenizer_with_threads_has_two_processes_and_one_without_has_all_cores(
    tokenizer, monkeypatch, kind, many
):
    monkeypatch.setattr(encoder, "cores", lambda: 8)
    best = Encoder(of_kind(kind, tokenizer), 1, Cut(12)).best_workers
    assert (best(1000), best(encoder.MANY_BYTES)) == (1, many)


SLOWLY = """
import sys, time
from pathlib import Path

import pyarrow as pa
from transformers import AutoTokenizer

from ft.data.columns import Columns
from ft.data.encode import encode
from ft.data.pieces import Cut

class Bar:
    def update(self, rows):
        print("a batch", flush=True)
        time.sleep(3600)

model, path = sys.argv[1:]
table = pa.table({"text": ["a text"] * 9000})
encode(table, Columns(("text",), ""), AutoTokenizer.from_pretrained(model), Cut(12), Path(path), 2, Bar())
"""


def test_processes_that_encode_end_with_a_run_that_is_killed(tiny_model, tmp_path):
    """Nor do they run its script, which has no main guard."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    words = [sys.executable, tmp_path / "slowly.py", tiny_model, tmp_path / "rows.arrow"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as run:
        assert run.stdout.readline() == b"a batch\n"
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) == 2
        run.kill()
    assert all_ended(children, 30)


@pytest.mark.usefixtures("processes")
def test_a_fault_in_the_code_of_a_process_that_encodes_is_no_users_mistake(tokenizer, reviews, monkeypatch):
    monkeypatch.setattr(workers, "PROGRAM", "raise ValueError('of a tokenizer')")
    with pytest.raises(RuntimeError, match="a process that encodes the texts failed, exit code 1"):
        Prepared(tokenizer, 12, dataset_name=reviews, preprocessing_num_workers=2, overwrite_cache=True)


def test_a_process_that_encodes_and_is_ended_from_outside_is_said(tokenizer, reviews, monkeypatch, processes):
    send = workers._send

    def end_one(process, *things):
        send(process, *things)
        if process is processes[1] and len(things) == 1:
            process.kill()

    monkeypatch.setattr(workers, "_send", end_one)
    with pytest.raises(UserError, match=r"exit code -9.* set preprocessing_num_workers to 1"):
        Prepared(tokenizer, 12, dataset_name=reviews, preprocessing_num_workers=2)
    assert len(processes) == 2 and all(one.poll() is not None for one in processes)


def test_a_disk_that_is_full_ends_the_processes_that_encode(tokenizer, reviews, monkeypatch, processes):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode.pa, "record_batch", full)
    with pytest.raises(UserError, match="No space left"):
        Prepared(tokenizer, 12, dataset_name=reviews, preprocessing_num_workers=2)
    assert len(processes) == 2 and all(one.poll() is not None for one in processes)


# --- the cache


def test_the_second_run_encodes_nothing_and_knows_the_same(tokenizer, reviews):
    first, second = (Prepared(tokenizer, dataset_name=reviews) for _ in range(2))
    assert first.encoded == 203 + 61 + 47 and second.encoded == 0
    assert (second.facts, second.notes, second.names) == (first.facts, first.notes, first.names)
    assert second.data.fingerprint == first.data.fingerprint
    for split, rows in first.splits.items():
        assert rows.table.equals(second.splits[split].table)


def test_what_a_killed_run_had_encoded_is_cleared_away(tokenizer, reviews):
    folder = cache_root() / Prepared(tokenizer, dataset_name=reviews).data.fingerprint
    half = folder.rename(folder.with_name(f"{folder.name}.{platform.node()}.1.tmp"))
    assert Prepared(tokenizer, dataset_name=reviews).encoded == 203 + 61 + 47
    assert folder.exists() and not half.exists()


def test_overwrite_cache_encodes_again(tokenizer, reviews):
    Prepared(tokenizer, dataset_name=reviews)
    assert Prepared(tokenizer, dataset_name=reviews, overwrite_cache=True).encoded == 203 + 61 + 47


def test_no_process_takes_the_old_encoding_that_overwrite_cache_replaces(tokenizer, reviews, monkeypatch):
    """The first one encodes, and the others take what it has made since they arrived."""
    Prepared(tokenizer, dataset_name=reviews)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Prepared(tokenizer, dataset_name=reviews, overwrite_cache=True).encoded == 203 + 61 + 47
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(prepare, "_stamp", Mock(side_effect=[1, 2]))
    assert Prepared(tokenizer, dataset_name=reviews, overwrite_cache=True).encoded == 0


def test_where_data_and_tokenizer_lie_and_how_many_work_does_not_matter(
    tokenizer, tiny_model, reviews, tmp_path
):
    from transformers import AutoTokenizer

    Prepared(tokenizer, dataset_name=reviews)
    shutil.copytree(reviews, tmp_path / "elsewhere")
    shutil.copytree(tiny_model, tmp_path / "model")
    copied = AutoTokenizer.from_pretrained(tmp_path / "model")
    again = Prepared(
        copied, dataset_name=tmp_path / "elsewhere", preprocessing_num_workers=2, dataloader_num_workers=1
    )
    assert again.encoded == 0


def test_a_tokenizer_that_was_used_is_the_same_tokenizer(tokenizer, reviews):
    Prepared(tokenizer, dataset_name=reviews)
    tokenizer("a b c", truncation=True, max_length=5, padding="max_length")
    assert Prepared(tokenizer, dataset_name=reviews).encoded == 0


@pytest.mark.parametrize("change", ["a byte", "a token", "max_length", "options", "lower case"])
def test_whatever_changes_the_encoding_changes_the_key(tokenizer, tiny_model, reviews, tmp_path, change):
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    before = Prepared(tokenizer, dataset_name=reviews)
    other = AutoTokenizer.from_pretrained(tiny_model)
    folder = shutil.copytree(reviews, tmp_path / "copy")
    options = {}
    if change == "a byte":
        content = (folder / "validation.csv").read_text()
        (folder / "validation.csv").write_text(content.replace("the", "thy", 1))
    elif change == "a token":
        other.add_tokens(["thy"])
    elif change == "lower case":
        other.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif change == "max_length":
        options = {"max_length": 30}
    else:
        options = {"max_train_samples": 100}
    after = Prepared(other, dataset_name=folder, **options)
    assert after.encoded > 0 and after.data.fingerprint != before.data.fingerprint


@pytest.mark.parametrize("name", ["train.arrow", "data.json"])
def test_a_damaged_encoding_is_made_again(tokenizer, reviews, tmp_path, name):
    before = Prepared(tokenizer, dataset_name=reviews)
    path = tmp_path / "home" / "ft-encoded" / before.data.fingerprint / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert Prepared(tokenizer, dataset_name=reviews).encoded == 203 + 61 + 47


def test_data_that_is_refused_leaves_nothing_in_the_cache(tokenizer, tmp_path):
    rows = [*make_rows(20), {"text": "", "label": "bad"}]
    with pytest.raises(UserError):
        Prepared(tokenizer, train_file=write_csv(tmp_path / "t.csv", rows))
    assert [
        p.name for p in (tmp_path / "home" / "ft-encoded").iterdir() if not p.name.endswith(".lock")
    ] == []


def test_a_cache_that_cannot_be_written_is_named(tokenizer, reviews, tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(UserError, match=r"encoding cache.*set HF_HOME.*HF_HUB_CACHE"):
        Prepared(tokenizer, dataset_name=reviews)


# --- labels


def labels_of(tokenizer, path):
    made = Prepared(tokenizer, train_file=path, validation_split_percentage=0)
    return made.names, made.labels("train")


def test_whole_numbers_are_sorted_as_numbers(tokenizer, tmp_path):
    given_labels = ["10", "9", "-1", "2", "10"]
    rows = [{"text": f"a {i}", "label": label} for i, label in enumerate(given_labels)]
    assert labels_of(tokenizer, write_csv(tmp_path / "t.csv", rows)) == (["-1", "2", "9", "10"], given_labels)
    numbers = [{**row, "label": int(row["label"])} for row in rows]
    assert labels_of(tokenizer, jsonl(tmp_path / "t.jsonl", numbers)) == (
        ["-1", "2", "9", "10"],
        given_labels,
    )


@pytest.mark.parametrize(
    "labels, names",
    [
        (["b", "a", "Z"], ["Z", "a", "b"]),
        ([" a", "b ", "a"], ["a", "b"]),
        (["10", "007", "1", "02", "01"], ["01", "1", "02", "007", "10"]),
        ([True, False, True], ["false", "true"]),
        ([2.0, 1.0, 2.0], ["1", "2"]),
        ([5, 3, 4], ["3", "4", "5"]),
    ],
)
def test_names_of_the_classes_and_their_order(tokenizer, tmp_path, labels, names):
    rows = [{"text": f"a {i}", "label": label} for i, label in enumerate(labels)]
    assert labels_of(tokenizer, jsonl(tmp_path / "t.jsonl", rows))[0] == names


def test_whole_numbers_beyond_64_bits_are_names(tokenizer, tmp_path):
    big = 10**30
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"film {i}", "label": big + i % 2}) + "\n" for i in range(40))
    )
    assert Prepared(tokenizer, train_file=tmp_path / "t.jsonl").names == [str(big), str(big + 1)]


def test_text_columns_that_are_not_used_are_named(tokenizer, tmp_path):
    """A pair of which one column has a common name must not silently be taken for a single text."""
    rows = [{"question": "is it", "sentence": row["text"], "label": row["label"]} for row in make_rows(40)]
    path = write_csv(tmp_path / "t.csv", rows)
    said = [note for note in Prepared(tokenizer, train_file=path).notes if "and not" in note]
    assert len(said) == 1 and "'sentence', and not 'question'" in said[0] and "pair" in said[0]
    named = Prepared(tokenizer, train_file=path, text_column_names="question,sentence")
    assert not any("and not" in note for note in named.notes)


def test_the_order_of_a_classlabel_is_kept_even_for_classes_without_a_row(tokenizer, tmp_path):
    import datasets

    names = ["worst", "best", "absent", "middling"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = [{"text": f"a {i}", "label": label} for i, label in enumerate([1, 0, 3, 1])]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    made = Prepared(tokenizer, dataset_name=tmp_path / "saved", validation_split_percentage=0)
    assert made.names == names and made.labels("train") == ["best", "worst", "middling", "best"]


def test_another_order_of_names_in_a_classlabel_of_validation_is_followed(tokenizer, tmp_path):
    import datasets

    def split(names, labels):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = [{"text": f"{names[0]} {i}", "label": label} for i, label in enumerate(labels)]
        return datasets.Dataset.from_list(rows, features=features)

    saved = datasets.DatasetDict(train=split(["a", "b"], [0, 1]), validation=split(["b", "a"], [0, 1]))
    saved.save_to_disk(tmp_path / "saved")
    made = Prepared(tokenizer, dataset_name=tmp_path / "saved")
    assert (made.labels("train"), made.labels("validation")) == (["a", "b"], ["b", "a"])


def test_a_test_split_without_labels_is_not_scored_and_that_is_said(tokenizer, reviews, tmp_path):
    rows = [{"text": row["text"], "label": ""} for row in make_rows(9)]
    folder = shutil.copytree(reviews, tmp_path / "copy")
    write_csv(folder / "test.csv", rows)
    made = Prepared(tokenizer, dataset_name=folder)
    assert set(made.splits) == {"train", "validation"}
    assert any(note.startswith("test: no row has a label") for note in made.notes)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("tests", [[{"text": "a"}], [{"text": "a", "label": "-1"}]])
def test_another_split_can_be_evaluated_where_the_test_split_has_no_labels(
    tokenizer, reviews, tmp_path, split, tests
):
    folder = shutil.copytree(reviews, tmp_path / "copy")
    write_csv(folder / "test.csv", tests)
    task = TextClassification()
    task.load_state({"problem_type": "single_label_classification", "label_names": ["bad", "fine", "good"]})
    made = Prepared(tokenizer, dataset_name=folder, only=split, task=task)
    assert set(made.splits) == {split}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("labels", [[0.5, 2.5, 4.0, 1.0], [0, 1, 1, 0]])
def test_a_test_split_with_minus_one_for_every_label_has_none(tokenizer, tmp_path, labels, kind):
    """As in GLUE, which hides them. If training has it, it is a label."""
    write = {"jsonl": jsonl, "csv": write_csv}[kind]

    def made(training, tests):
        for name, values in (("train", training), ("test", tests)):
            write(tmp_path / f"{name}.{kind}", [{"text": f"a {i}", "label": v} for i, v in enumerate(values)])
        files = {f"{name}_file": tmp_path / f"{name}.{kind}" for name in ("train", "test")}
        return Prepared(tokenizer, **files, validation_split_percentage=0)

    hidden = made(labels, [type(labels[0])(-1)] * 2)
    assert set(hidden.splits) == {"train"}
    assert any(note.startswith("test: no row has a label") for note in hidden.notes)
    if isinstance(labels[0], int):
        assert set(made([-1, 1, 1, -1], [-1, -1]).splits) == {"train", "test"}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8])
def test_minus_one_is_known_in_every_type_of_number(kind):
    task = TextClassification()
    task.load_state({"problem_type": "single_label_classification", "label_names": ["1", "2"]})
    for last, found in ((-1, False), (2, True)):
        table = pa.table({"label": pa.array(np.array([-1, last], kind))})
        assert has_labels(table, "label", task) is found


def test_a_split_can_be_encoded_alone_for_a_model_that_knows_its_labels(tokenizer, reviews):
    task = TextClassification()
    task.load_state({"problem_type": "single_label_classification", "label_names": ["good", "fine", "bad"]})
    made = Prepared(tokenizer, dataset_name=reviews, only="test", task=task)
    assert set(made.splits) == {"test"} and made.names == ["good", "fine", "bad"]
    assert made.labels("test") == [row["label"] for row in make_rows(47, seed=2)]


@pytest.mark.parametrize("names", [["text", "text", "label"], ["text", "label", "label"]])
def test_a_column_that_stands_twice_is_named_where_it_was_guessed(tokenizer, tmp_path, names):
    arrays = [pa.array(["x", "y"])] * 3
    pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "t.parquet")
    twice = next(name for name in names if names.count(name) == 2)
    with pytest.raises(UserError, match=f"column_names?: the train data has more than one column '{twice}'"):
        Prepared(tokenizer, train_file=tmp_path / "t.parquet")
    good = write_csv(tmp_path / "good.csv", make_rows(9))
    with pytest.raises(UserError, match=f"column_names?: the test data has more than one column '{twice}'"):
        Prepared(tokenizer, train_file=good, test_file=tmp_path / "t.parquet")


def test_a_column_of_several_types_is_not_taken_for_the_text(tokenizer, tmp_path):
    """Nor is its name among the suggestions."""
    rows = [{"body": f"the film {n}", "label": n % 2, "meta": [1, "x"][n % 2]} for n in range(6)]
    made = Prepared(tokenizer, train_file=jsonl(tmp_path / "t.jsonl", rows), validation_split_percentage=0)
    assert made.data.columns.texts == ("body",) and not any("meta" in note for note in made.notes)
    rows = [{"a": "x", "b": "y", "label": n % 2, "meta": [1, "x"][n % 2]} for n in range(6)]
    with pytest.raises(
        UserError, match=r"among the columns 'a', 'b', 'label' \(int64\), 'meta' \(several types\)"
    ):
        Prepared(tokenizer, train_file=jsonl(tmp_path / "t.jsonl", rows))


def test_without_a_home_the_cache_asks_for_a_place(monkeypatch):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    with pytest.raises(UserError, match="needs a home folder, but there is none; set HF_HOME"):
        cache_root()


# --- bad rows and duplicates


def test_dropped_rows_are_counted_and_the_others_keep_their_numbers(tokenizer, tmp_path):
    rows = make_rows(20)
    rows[3]["text"], rows[7]["text"], rows[11]["label"] = "", "\t ", " "
    path = write_csv(tmp_path / "t.csv", rows)
    made = Prepared(tokenizer, train_file=path, on_bad_rows="drop", validation_split_percentage=0)
    assert made.splits["train"].row.tolist() == [i for i in range(20) if i not in (3, 7, 11)]
    assert sum(made.facts["train"]["dropped"].values()) == 3 and made.facts["train"]["rows"] == 17
    assert any("dropped 3 of 20 rows" in note for note in made.notes)
    path = write_csv(tmp_path / "t.csv", [{"text": "", "label": "a"}] * 4)
    with pytest.raises(UserError, match="none of its 4 rows"):
        Prepared(tokenizer, train_file=path, on_bad_rows="drop")


@pytest.fixture
def overlapping(tmp_path):
    """20 training rows; rows 0 to 4 are also in validation and 3 to 6 in test; 4 is the same in both."""
    rows = make_rows(20)
    write_csv(tmp_path / "d" / "train.csv", rows)
    write_csv(tmp_path / "d" / "validation.csv", [*rows[:5], *make_rows(5, seed=8)])
    write_csv(tmp_path / "d" / "test.csv", [*rows[3:7], *make_rows(5, seed=9)])
    return tmp_path / "d"


def test_texts_in_two_splits_are_counted(tokenizer, overlapping):
    made = Prepared(tokenizer, dataset_name=overlapping)
    assert {name: len(split) for name, split in made.splits.items()} == {
        "train": 20,
        "validation": 10,
        "test": 9,
    }
    assert "9 of 39 rows repeat the text of an earlier one, in their split or another" in made.notes
    assert made.facts["train"]["shared_with_test"] == 4 and made.facts["train"]["shared_with_validation"] == 5
    assert made.facts["validation"]["shared_with_test"] == 2
    warnings = [note for note in made.notes if note.startswith("WARNING")]
    assert len(warnings) == 3 and "on_duplicates" in warnings[0]


def test_texts_in_two_splits_can_be_dropped_and_the_test_split_stays_whole(tokenizer, overlapping):
    made = Prepared(tokenizer, dataset_name=overlapping, on_duplicates="drop")
    texts = {name: made.texts(name) for name in made.splits}
    assert len(texts["test"]) == 9 and made.facts["train"]["rows"] == len(texts["train"]) == 13
    assert made.splits["train"].row.tolist() == list(range(7, 20))
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not set(texts[one]) & set(texts[other])


def test_repeated_texts_within_a_split_are_counted_and_kept(tokenizer, tmp_path):
    path = write_csv(tmp_path / "t.csv", make_rows(20) * 2)
    made = Prepared(tokenizer, train_file=path, validation_split_percentage=0)
    assert len(made.splits["train"]) == 40 and made.facts["train"]["repeated_texts"] == 20


# --- samples and splits


@pytest.mark.parametrize("most", [1, 10, 99])
def test_a_sample_is_the_one_that_datasets_takes(most):
    import datasets

    dataset = datasets.Dataset.from_dict({"row": list(range(100))})
    assert sample(100, most).tolist() == dataset.shuffle(seed=42).select(range(most))["row"][:]


def test_samples_of_the_splits(tokenizer, reviews):
    made = Prepared(
        tokenizer, dataset_name=reviews, max_train_samples=100, max_eval_samples=20, max_predict_samples=999
    )
    assert {name: len(split) for name, split in made.splits.items()} == {
        "train": 100,
        "validation": 20,
        "test": 47,
    }
    assert made.splits["train"].row.tolist() == sample(203, 100).tolist()
    assert [note for note in made.notes if "sample of" in note] == [
        "train: a sample of 100 of 203 rows", "validation: a sample of 20 of 61 rows",
    ]  # fmt: skip


def test_validation_rows_are_set_aside_in_proportion_and_never_from_the_test_split(tokenizer, tmp_path):
    rows = [{"text": f"a {i}", "label": "rare" if i % 10 == 0 else "common"} for i in range(200)]
    write_csv(tmp_path / "d" / "train.csv", rows)
    write_csv(tmp_path / "d" / "test.csv", [{"text": f"b {i}", "label": "rare"} for i in range(30)])
    made = Prepared(tokenizer, dataset_name=tmp_path / "d")
    assert {name: len(split) for name, split in made.splits.items()} == {
        "train": 180,
        "validation": 20,
        "test": 30,
    }
    assert made.labels("validation").count("rare") == 2
    together = [*made.splits["train"].row, *made.splits["validation"].row]
    assert sorted(together) == list(range(200))
    assert not any(text.startswith("b") for text in made.texts("validation"))
    assert any("set aside" in note and "validation 20" in note for note in made.notes)


def test_a_test_split_is_set_aside_only_on_demand(tokenizer, tmp_path):
    path = write_csv(tmp_path / "t.csv", make_rows(200))
    made = Prepared(tokenizer, train_file=path, test_split_percentage=20)
    assert {name: len(split) for name, split in made.splits.items()} == {
        "train": 140,
        "validation": 20,
        "test": 40,
    }


def test_a_share_beside_a_split_that_is_there_is_said_to_set_nothing_aside(tokenizer, tmp_path):
    files = {
        f"{split}_file": write_csv(tmp_path / f"{split}.csv", make_rows(40, seed))
        for seed, split in enumerate(("train", "validation", "test"))
    }

    def said(**options):
        notes = Prepared(tokenizer, **{**files, **options}).notes
        return [note for note in notes if "of its own" in note]

    assert said(validation_split_percentage=20, test_split_percentage=20) == [
        f"{split}_split_percentage: the data has {split} rows of its own; nothing is set aside"
        for split in ("validation", "test")
    ]
    assert said() == said(validation_split_percentage=0) == []  # none was asked for
    unlabelled = write_csv(tmp_path / "unlabelled.csv", [{"text": "the film"}])
    assert said(test_file=unlabelled, test_split_percentage=20) == []  # rows are set aside instead


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=300),
    st.floats(0.1, 49),
    st.one_of(st.none(), st.floats(0.1, 49)),
)
def test_stratified_parts_share_the_rows_and_keep_the_proportions(labels, first, second):
    labels = np.array(labels)
    shares = {"validation": first} | ({"test": second} if second else {})
    parts = stratified(labels, shares)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(labels)))
    for name, share in shares.items():
        assert np.all(np.diff(parts[name]) > 0)
        for value in np.unique(labels):
            size = np.count_nonzero(labels == value)
            taken = np.count_nonzero(labels[parts[name]] == value)
            assert taken <= size * share / 100 + 1, "rounding is carried, not piled up"
        assert len(parts[name]) <= len(labels) * share / 100 + 0.5
    for value in np.unique(labels):
        assert np.count_nonzero(labels[parts["train"]] == value) >= 1
    again = stratified(labels, shares)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_classes_of_one_row_do_not_take_theirs_from_a_larger_one():
    labels = np.concatenate([np.arange(300), np.full(40, 300)])
    parts = stratified(labels, {"validation": 10})
    assert 4 <= len(parts["validation"]) <= 5 and set(labels[parts["validation"]]) == {300}


def test_batches_are_smaller_where_texts_are_long(tokenizer, reviews, monkeypatch):
    whole = Prepared(tokenizer, dataset_name=reviews).splits["train"]
    monkeypatch.setattr("ft.data.encode.BYTES_PER_BATCH", 1000)
    parts = Prepared(tokenizer, dataset_name=reviews, overwrite_cache=True).splits["train"]
    assert parts.table["input_ids"].num_chunks > 5 and parts.table.equals(whole.table)


def test_large_classes_are_cut_within_a_row_of_their_share():
    labels = np.repeat([0, 1, 2], [1000, 333, 57])
    parts = stratified(labels, {"validation": 10, "test": 5})
    for name, share in (("validation", 10), ("test", 5)):
        counts = np.bincount(labels[parts[name]])
        assert np.all(np.abs(counts - np.array([1000, 333, 57]) * share / 100) <= 1)


def test_slices_of_a_column_of_several_types_are_called_by_their_values(tmp_path, tokenizer):
    places = [1, "Café", None, True, "1"]
    rows = [{**row, "place": place} for row, place in zip(make_rows(5), places, strict=True)]
    path = jsonl(tmp_path / "train.jsonl", rows)
    data = Prepared(tokenizer, train_file=path, validation_split_percentage=0).data
    read_slice_columns(
        Config(train_file=str(path), validation_split_percentage=0, slice_columns="place"), data
    )
    assert slice_values(data, "train", np.arange(5)) == {"place": ["1", "Café", None, "true", "1"]}


def test_data_that_changes_before_its_slices_are_read_is_one_message(tmp_path, tokenizer):
    path = write_csv(tmp_path / "train.csv", make_rows(20))
    data = Prepared(tokenizer, train_file=path, validation_split_percentage=0).data
    options = Config(train_file=str(path), validation_split_percentage=0, slice_columns="label")
    read_slice_columns(options, data)
    assert list(data.slices) == ["train"]
    write_csv(path, make_rows(30))
    with pytest.raises(UserError, match="slice_columns: the train data was changed while it was read"):
        read_slice_columns(options, data)


def test_data_that_changes_while_it_is_read_is_not_kept_under_its_old_name(
    tmp_path, tokenizer, monkeypatch, own_cache
):
    path = write_csv(tmp_path / "train.csv", make_rows(20))
    encoding = prepare.encode

    def late(*args):
        write_csv(path, make_rows(30))
        return encoding(*args)

    monkeypatch.setattr(prepare, "encode", late)
    with pytest.raises(UserError, match="changed while it was read; start again"):
        Prepared(tokenizer, train_file=path)
    monkeypatch.setattr(prepare, "encode", encoding)
    assert Prepared(tokenizer, train_file=path).encoded == 30
