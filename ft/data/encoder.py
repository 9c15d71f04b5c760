"""Texts to token ids, truncated if a text is too long for the model."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from ft.data.pieces import Cut, special_tokens

# From this many bytes of text on (on two cores, some fifteen seconds of work), two processes are worth
# starting, which takes most of a second.
MANY_BYTES = 20 * 2**20
MANY_BYTES_IN_PYTHON = 5 * 2**20  # some five seconds, of which a second process saves half, and costs two


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """A function from texts to columns of encoded rows, which can be sent to another process.

    It calls the tokenizers library directly, without offsets: 1.15 times as fast as the tokenizer of
    Transformers, which an encoding process then need not import. A tokenizer in Python, or with its own way
    of encoding (LUKE), is called as it is."""

    def __init__(self, tokenizer: Any, columns: int, cut: Cut) -> None:
        from transformers import PreTrainedTokenizerFast

        self.cut = cut
        self.truncation_side = tokenizer.truncation_side
        self.typed = columns == 2 and "token_type_ids" in tokenizer.model_input_names
        self.around = special_tokens(tokenizer) if columns == 1 else ([], [])
        self.in_rust = getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
        self.has_threads = tokenizer.is_fast
        self.tokenizer = tokenizer
        if self.in_rust:
            self.tokenizer = tokenizer.backend_tokenizer
            self.tokenizer.no_padding()
            self.split_special_tokens = tokenizer.split_special_tokens

    def best_workers(self, size: int) -> int:
        """The number of processes that encodes so many bytes of text fastest.

        Rust tokenizers are multi-threaded. Two such processes, with half of the threads each, keep the cores
        busy even while one makes arrays of its threads' results; and they have the C library's default heap,
        not a run's (`ft/heap.py`), which costs a tokenizer a seventh of its time. A Python tokenizer is
        single-threaded, and takes twice as long on two cores (ByT5; most are slower)."""
        if size < (MANY_BYTES if self.has_threads else MANY_BYTES_IN_PYTHON):
            return 1
        return min(2, cores()) if self.has_threads else cores()

    def __call__(self, texts: list[list[str]]) -> dict[str, pa.Array]:
        """The columns of some rows, whose one text or two texts of a pair are in `texts`: input_ids;
        token_type_ids (for pairs, if the tokenizer has them); full_length, the number of tokens before
        truncation; cut, whether the text is truncated; and, for windows, pieces: the number of equally long
        pieces into which input_ids is to be split."""
        cut = self.cut
        ids, types = self._token_ids(texts)
        full = np.fromiter(map(len, ids), np.int32, len(ids))
        pieces, lost = np.ones(len(ids), np.int32), np.zeros(len(ids), np.int8)
        long = np.flatnonzero(full > cut.max_length)
        from_left = cut.long_text == "truncate" and self.truncation_side == "left"
        if len(long) and (len(texts) == 2 or from_left):
            # The tokenizer's own way to cut; pairs have no other.
            columns = [[column[row] for row in long] for column in texts]
            short_ids, short_types = self._token_ids(columns, cut.max_length)
            for place, row in enumerate(long):
                ids[row], lost[row] = short_ids[place], True
                if types and short_types:
                    types[row] = short_types[place]
        elif len(long):
            # Cut by token ids, not encoded again: 2 to 2.8 times as fast on texts of 485 tokens cut at 128.
            prefix, suffix = self.around
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

    def _token_ids(self, texts: list[list[str]], max_length: int | None = None) -> tuple[list, list | None]:
        """Token ids of the texts, whole or truncated, and token types of pairs if the model takes them: each
        a list of numbers per row."""
        if not self.in_rust:
            encoded = self.tokenizer(
                *texts, return_attention_mask=False, return_token_type_ids=len(texts) == 2, verbose=False,
                truncation=max_length is not None, max_length=max_length,
            )  # fmt: skip
            return encoded["input_ids"], encoded.get("token_type_ids") if self.typed else None
        self.tokenizer.encode_special_tokens = self.split_special_tokens  # which is not sent with it
        self.tokenizer.no_truncation()
        if max_length is not None:
            self.tokenizer.enable_truncation(max_length, direction=self.truncation_side)
        rows = self.tokenizer.encode_batch_fast(
            texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        )
        return [row.ids for row in rows], [row.type_ids for row in rows] if self.typed else None
