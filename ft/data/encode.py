"""Texts to token ids, written to an Arrow file as they come and mapped into memory from there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ft.data.audit import Columns
from ft.data.pieces import Cut, special_tokens

# While it is encoded, a text takes 100 bytes a token. 4,096 rows at a time are 0.94 times as fast.
ROWS_PER_BATCH = 1024


def encode(
    table: pa.Table,
    columns: Columns,
    tokenizer: Any,
    cut: Cut,
    path: Path,
    workers: int | None,
    bar: Any,
) -> None:
    """Write `table` with more columns to the Arrow file `path`: input_ids; token_type_ids (for pairs, where
    the tokenizer has them); full_length, the tokens that the text has before it is cut; cut, whether the
    model does not see all of it; and, for windows, pieces: into how many of one length input_ids is to be
    taken apart."""
    batches = table.to_batches(max_chunksize=ROWS_PER_BATCH)
    texts = ([batch.column(name).to_pylist() for name in columns.texts] for batch in batches)
    workers = min(workers or (1 if tokenizer.is_fast else _cores()), len(batches))
    writer = None
    with pa.OSFile(str(path), "wb") as file:
        for batch, encoded in zip(batches, _encoded(texts, tokenizer, cut, workers), strict=True):
            arrays = dict(zip(batch.schema.names, batch.columns, strict=True)) | encoded
            out = pa.record_batch(arrays)
            writer = writer or pa.ipc.new_file(file, out.schema)
            writer.write_batch(out)
            bar.update(out.num_rows)
        if writer:
            writer.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoded(
    texts: Iterable[list[list[str]]], tokenizer: Any, cut: Cut, workers: int
) -> Iterator[dict[str, pa.Array]]:
    """Encode batch after batch, with few of them in memory: a fast tokenizer with its own threads, a slow one
    in worker processes."""
    if workers <= 1:
        yield from (_encode_batch(tokenizer, batch, cut) for batch in texts)
        return
    with ProcessPoolExecutor(workers, initializer=_keep, initargs=(tokenizer,)) as pool:
        waiting: deque[Future] = deque()
        for batch in texts:
            waiting.append(pool.submit(_encode_in_worker, batch, cut))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_kept: list[Any] = []  # in a worker process: the tokenizer, which is sent once


def _keep(tokenizer: Any) -> None:
    _kept[:] = [tokenizer]


def _encode_in_worker(texts: list[list[str]], cut: Cut) -> dict[str, pa.Array]:
    return _encode_batch(_kept[0], texts, cut)


def _encode_batch(tokenizer: Any, texts: list[list[str]], cut: Cut) -> dict[str, pa.Array]:
    ids, types = _token_ids(tokenizer, texts)
    full = np.fromiter(map(len, ids), np.int32, len(ids))
    pieces, lost = np.ones(len(ids), np.int32), np.zeros(len(ids), np.int8)
    long = np.flatnonzero(full > cut.max_length)
    from_left = cut.long_text == "truncate" and tokenizer.truncation_side == "left"
    if len(long) and (len(texts) == 2 or from_left):  # the tokenizer's own way to cut; pairs have no other
        columns = [[column[row] for row in long] for column in texts]
        short_ids, short_types = _token_ids(tokenizer, columns, cut.max_length)
        for place, row in enumerate(long):
            ids[row], lost[row] = short_ids[place], True
            if types and short_types:
                types[row] = short_types[place]
    elif len(long):
        prefix, suffix = special_tokens(tokenizer)
        for row in long:
            parts = cut.pieces(ids[row], prefix, suffix)
            ids[row], pieces[row] = list(chain.from_iterable(parts)), len(parts)
            lost[row] = cut.loses(full[row], len(prefix) + len(suffix))
    arrays = {"input_ids": pa.array(ids, pa.list_(pa.int32()))}
    arrays |= {"full_length": pa.array(full), "cut": pa.array(lost)}
    if types:
        arrays["token_type_ids"] = pa.array(types, pa.list_(pa.int8()))
    if cut.long_text == "windows":
        arrays["pieces"] = pa.array(pieces)
    return arrays


def _token_ids(
    tokenizer: Any, texts: list[list[str]], max_length: int | None = None
) -> tuple[list, list | None]:
    """Token ids, of whole texts or truncated, and, of pairs where the model takes them, token types: each a
    list of numbers for a row.

    As `tokenizer(*texts)` gives them, but from the tokenizers library itself, which leaves the offsets out:
    1.15 times as fast. Not for tokenizers with a way of their own (LUKE)."""
    from transformers import PreTrainedTokenizerFast

    typed = len(texts) == 2 and "token_type_ids" in tokenizer.model_input_names
    if getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        encoded = tokenizer(
            *texts, return_attention_mask=False, return_token_type_ids=len(texts) == 2, verbose=False,
            truncation=max_length is not None, max_length=max_length,
        )  # fmt: skip
        return encoded["input_ids"], encoded.get("token_type_ids") if typed else None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    if max_length is not None:
        backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    rows = backend.encode_batch_fast(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
    return [row.ids for row in rows], [row.type_ids for row in rows] if typed else None


class EncodedRows:
    """The encoded rows of one split, mapped from their Arrow file: a few bytes a row are in memory.

    `lengths` (rows,) holds the tokens that the model sees, `full_lengths` those of the whole text, `cut`
    whether it does not see all of it, `row` the row number in the source. `labels` is (rows,), or (rows,
    labels) of 0 and 1; None without any. `pieces` (rows,): the windows of each text, all of a text of one
    length; None where a text is one piece. `longest` is the longest piece, in tokens."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.full_lengths = _numbers(self.table["full_length"].chunks)
        self.cut = _numbers(self.table["cut"].chunks).astype(bool)
        self.row = _numbers(self.table["row"].chunks)
        self.pieces = _numbers(self.table["pieces"].chunks) if "pieces" in self.table.column_names else None
        self.labels = labels_of(self.table) if "label" in self.table.column_names else None
        ids = self.table["input_ids"].chunks
        self._chunk_starts = np.cumsum([0] + [len(chunk) for chunk in ids])
        self._offsets = [np.from_dlpack(chunk.offsets) for chunk in ids]
        self._lists = {"input_ids": [np.from_dlpack(chunk.values) for chunk in ids]}
        if "token_type_ids" in self.table.column_names:
            self._lists["token_type_ids"] = [
                np.from_dlpack(chunk.values) for chunk in self.table["token_type_ids"].chunks
            ]
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int32)
        self.longest = int((self.lengths // (1 if self.pieces is None else self.pieces)).max(initial=0))

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def open(path: Path) -> EncodedRows:
        """The rows that `encode` has written."""
        return EncodedRows(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def take(self, rows: np.ndarray) -> EncodedRows:
        """Some of the rows, in memory."""
        return EncodedRows(self.table.take(pa.array(rows)))

    def part(self, begin: int, end: int) -> EncodedRows:
        """The rows from `begin` to before `end`, still mapped."""
        return EncodedRows(self.table.slice(begin, end - begin))

    def padded(self, rows: np.ndarray, pad_id: int, multiple: int = 1) -> dict[str, np.ndarray]:
        """input_ids, attention_mask (and token_type_ids) of `rows`, each (pieces, longest of them), int64;
        the pieces of a row follow one another. Widths are rounded up to a multiple, as far as there are rows
        as long.

        Padding is always on the right: a token's position, and so its dropout, is the same in any batch.
        """
        pieces = np.ones(len(rows), np.int32) if self.pieces is None else self.pieces[rows]
        width = int((self.lengths[rows] // pieces).max())
        shape = (int(pieces.sum()), min(-(-width // multiple) * multiple, max(width, self.longest)))
        out = {"input_ids": np.full(shape, pad_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
        if "token_type_ids" in self._lists:
            out["token_type_ids"] = np.zeros(shape, np.int64)
        chunks = np.searchsorted(self._chunk_starts, rows, side="right") - 1
        place = 0
        for row, chunk, count in zip(rows, chunks, pieces, strict=True):
            inside = row - self._chunk_starts[chunk]
            begin, end = self._offsets[chunk][inside : inside + 2]
            here = slice(place, place + count), slice((end - begin) // count)
            for name, lists in self._lists.items():
                out[name][here] = lists[chunk][begin:end].reshape(count, -1)
            out["attention_mask"][here] = 1
            place += count
        return out


def labels_of(table: pa.Table) -> np.ndarray:
    """The encoded labels of a table: (rows,), or (rows, labels) of 0 and 1."""
    chunks, kind = table["label"].chunks, table["label"].type
    if not pa.types.is_fixed_size_list(kind):
        return _numbers(chunks)
    return _numbers([chunk.flatten() for chunk in chunks]).reshape(-1, kind.list_size)


def _numbers(chunks: list[pa.Array]) -> np.ndarray:
    """A column without nulls as one array. (Arrow's own to_numpy would import pandas, for 0.3 s.)"""
    return np.concatenate([np.from_dlpack(chunk) for chunk in chunks])
