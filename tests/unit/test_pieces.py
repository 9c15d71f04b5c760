"""Long texts: what the model sees of them; windows are scored together, as one row."""

import json

import numpy as np
import pytest
import torch
from conftest import make_rows, score_here, train_here, write_csv
from hypothesis import given
from hypothesis import strategies as st
from prepared import Prepared

from ft.data.loader import EvaluationSampler, RowDataset, Slot, build_loader
from ft.data.pieces import Cut, special_tokens
from ft.data.plan import evaluation_batches
from ft.dropout import RowKeys
from ft.errors import UserError
from ft.tasks.text_classification import TextClassification

PREFIX, SUFFIX = [101], [102]


pytestmark = pytest.mark.usefixtures("own_cache")


def cut_into(body, *cut):
    return Cut(*cut).pieces([*PREFIX, *body, *SUFFIX], PREFIX, SUFFIX)


def test_head_tail_keeps_the_first_fourth_and_the_rest_from_the_end():
    assert cut_into(range(100), 10, "head_tail") == [[101, 0, 1, 94, 95, 96, 97, 98, 99, 102]]
    assert cut_into(range(3), 4, "head_tail") == [[101, 1, 2, 102]]  # a quarter of two tokens is none


def test_windows_overlap_by_a_fourth_and_the_last_ends_where_the_text_does():
    assert cut_into(range(12), 10, "windows", 8) == [[101, *range(8), 102], [101, *range(4, 12), 102]]
    begins = [piece[1] for piece in cut_into(range(100), 10, "windows", 99)]
    assert begins == [*range(0, 92, 6), 92]
    assert [piece[1] for piece in cut_into(range(100), 10, "windows", 3)] == [0, 6, 12]


@given(length=st.integers(3, 400), max_length=st.integers(3, 60), most=st.integers(1, 9))
def test_windows_hold_every_token_in_order_unless_there_are_too_many(length, max_length, most):
    body = list(range(length))
    if length + 2 <= max_length:
        return
    cut = Cut(max_length, "windows", most)
    pieces = cut.pieces([*PREFIX, *body, *SUFFIX], PREFIX, SUFFIX)
    assert all(len(piece) == max_length and piece[0] == 101 and piece[-1] == 102 for piece in pieces)
    seen = {token for piece in pieces for token in piece[1:-1]}
    assert len(pieces) <= most and seen == set(range(max(seen) + 1))
    assert cut.loses(length + 2, 2) == (seen != set(body))


def test_the_special_tokens_of_a_tokenizer_are_found(tokenizer):
    from transformers import ByT5Tokenizer

    assert special_tokens(tokenizer) == ([2], [3])
    assert special_tokens(ByT5Tokenizer()) == ([], [1])


@pytest.fixture
def windows(tokenizer, tmp_path):
    """Reviews of 5 to 46 words in at most four windows of ten tokens."""
    path = write_csv(tmp_path / "t.csv", make_rows(40))
    return Prepared(
        tokenizer, 10, train_file=path, long_text="windows", max_windows=4, validation_split_percentage=0
    ).splits["train"]


def test_a_row_is_one_row_whatever_its_windows(windows, tokenizer):
    assert len(windows) == 40 and windows.pieces.max() == 4 and windows.pieces.min() == 1
    assert np.array_equal(windows.lengths[windows.pieces > 1], 10 * windows.pieces[windows.pieces > 1])
    assert np.array_equal(windows.cut, windows.full_lengths - 2 > 8 + 3 * 6)
    rows = np.array([int(windows.pieces.argmax()), int(windows.pieces.argmin())])
    padded = windows.padded(rows, tokenizer.pad_token_id)
    assert padded["input_ids"].shape == (5, 10)
    text = windows.table["text"][int(rows[0])].as_py()
    ids = tokenizer(text)["input_ids"]
    assert padded["input_ids"][1].tolist() == [2, *ids[7:15], 3]  # the second window begins six tokens later
    assert padded["attention_mask"][4].sum() == windows.lengths[rows[1]]


def test_widths_are_rounded_up_as_far_as_there_are_texts_as_long(windows, tokenizer):
    """For a GPU. Beyond the longest piece of all, they could exceed the model's positions."""
    short = np.array([int(windows.lengths.argmin())])
    assert windows.longest == 10 and windows.lengths[short[0]] < 8
    widths = {m: windows.padded(short, 0, m)["input_ids"].shape[1] for m in (1, 8, 16)}
    assert widths == {1: windows.lengths[short[0]], 8: 8, 16: 10}
    dataset = RowDataset(windows, tokenizer)
    for device, multiple in (("cpu", 1), ("cuda", 8)):
        build_loader(dataset, [], 0, torch.device(device))
        assert dataset.multiple == multiple


def batch_of(rows, dataset):
    return dataset.__getitems__(Slot(np.array(rows), 0))


def test_a_batch_without_padding_has_no_mask(windows, tokenizer):
    """Its absence tells the model so, which need not read it."""
    dataset, lengths = RowDataset(windows, tokenizer), windows.lengths // windows.pieces
    longest = np.flatnonzero(lengths == lengths.max())
    assert "attention_mask" not in batch_of(longest, dataset).inputs
    assert "attention_mask" in batch_of([longest[0], lengths.argmin()], dataset).inputs


def test_a_row_has_the_mean_of_the_scores_of_its_windows(windows, tokenizer):
    dataset = RowDataset(windows, tokenizer)
    rows = [int(np.flatnonzero(windows.pieces == count)[0]) for count in (3, 1, 4)]
    batch = batch_of(rows, dataset)
    scores = torch.arange(16.0).view(8, 2)
    expected = [[2.0, 3.0], [6.0, 7.0], [11.0, 12.0]]
    assert torch.allclose(batch.of_rows(scores), torch.tensor(expected))
    for size in (1, 2):  # as after running out of memory
        parts = batch.split(size)
        begin = np.cumsum([0, *(len(part.piece_ids) for part in parts)])
        given = [part.of_rows(scores[a:b]) for part, a, b in zip(parts, begin, begin[1:], strict=False)]
        assert torch.allclose(torch.cat(given), torch.tensor(expected))
        assert torch.equal(torch.cat([part.piece_ids for part in parts]), batch.piece_ids)
        assert torch.equal(torch.cat([part.inputs["input_ids"] for part in parts]), batch.inputs["input_ids"])


def test_the_windows_of_a_row_have_dropout_masks_of_their_own_in_any_batch(windows, tokenizer):
    dataset = RowDataset(windows, tokenizer)
    long, other = (int(row) for row in np.flatnonzero(windows.pieces == 4)[:2])

    def masks(rows):
        keys = RowKeys(0)
        place = keys.place(0)
        keys.set(3, batch_of(rows, dataset).piece_ids)
        return keys.mask(place, (len(keys.keys), 50), 0)

    alone, behind = masks([long]), masks([other, long])[4:]
    assert torch.equal(alone, behind)
    assert len({tuple(mask.tolist()) for mask in alone}) == 4


def test_a_batch_of_an_evaluation_counts_windows(windows, tokenizer):
    batches = [slot.rows for slot in EvaluationSampler(RowDataset(windows, tokenizer), 6, 1)]
    assert sorted(row for rows in batches for row in rows) == list(range(40))
    assert max(windows.pieces[rows].sum() for rows in batches) <= 6 and min(map(len, batches)) == 1
    huge = evaluation_batches(np.array([90, 10]), 2, np.array([9, 1]))
    assert [rows.tolist() for rows in huge] == [[0], [1]]  # a row is never cut


def test_pairs_are_only_truncated(tokenizer, tmp_path):
    rows = [{"one": "the film", "two": "it was", "label": label} for label in "ab"] * 5
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=r"long_text: found windows, but a row has two texts \(one, two\)"):
        Prepared(tokenizer, 20, train_file=path, text_column_names="one,two", long_text="windows")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"long_text": "windows", "max_windows": 2}, "are scored in 2 windows; "),
        ({"long_text": "head_tail"}, "texts are cut at 12 tokens"),
    ],
)
def test_what_is_cut_is_said_and_eval_cuts_as_training_did(base_flags, tmp_path, capfd, options, said):
    words = base_flags | {"num_train_epochs": 1, "max_length": 12, **options}
    assert train_here(**words) == 0
    out = capfd.readouterr().out
    assert said in out and ("windows" in out) == ("max_windows" in options)
    config = json.loads((words["output_dir"] / "best/config.json").read_text())
    assert {key: config.get(key) for key in ("long_text", *options)} == {"long_text": None, **options}
    scored = tmp_path / "scored"
    asked = {"model_name_or_path": words["output_dir"] / "best", "dataset_name": words["dataset_name"]}
    assert score_here(**asked, output_dir=scored) == 0
    trained = json.loads((words["output_dir"] / "results.json").read_text())
    assert json.loads((scored / "results.json").read_text())["test/loss"] == trained["test/loss"]
    again = tmp_path / "again"  # further training cuts texts as before, unless told otherwise
    more = words | {"model_name_or_path": asked["model_name_or_path"], "max_train_steps": 1}
    for key in options:
        del more[key]
    assert train_here(**more | {"output_dir": again, "long_text": "truncate"}) == 0
    config = json.loads((again / "best/config.json").read_text())
    assert "long_text" not in config and "max_windows" not in config


@pytest.mark.parametrize("options", [{}, {"long_text": "head_tail"}])
def test_a_number_of_windows_without_windows_is_an_error(base_flags, options):
    with pytest.raises(UserError, match="max_windows: needs long_text: windows"):
        train_here(**base_flags, **options, max_windows=3)


def test_tasks_know_rows_only(windows, tokenizer):
    """The loss is a row's, not a window's."""
    task = TextClassification("single_label_classification")
    batch = batch_of(
        [int(windows.pieces.argmax()), int(windows.pieces.argmin())], RowDataset(windows, tokenizer)
    )

    class Model:
        def __call__(self, **inputs):
            logits = torch.zeros(len(inputs["input_ids"]), 3, requires_grad=True)
            return type("Output", (), {"logits": logits})

    assert task.loss(Model(), batch).item() == pytest.approx(2 * np.log(3), rel=1e-6)
    scores, losses = task.predict(Model(), batch)
    assert scores.shape == (2, 3) and losses.shape == (2,)
