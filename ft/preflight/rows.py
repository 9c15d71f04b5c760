"""What the audit looks at: the rows of each split, and the distinct texts in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 10  # of anything, in preflight.json
EXCERPT = 80  # characters of a text


@dataclass(frozen=True)
class Rows:
    """The rows of one split. `texts` (rows,) has one string per row, both texts of a pair joined; `row`
    (rows,) the row numbers in the source, from 0; `labels` (rows,) or (rows, labels) as the task encodes
    them, None if it cannot; `tokens` (rows,) their lengths before they are cut, None if no tokenizer could be
    loaded; `cut` (rows,) whether the model does not see all of a text: if None, this holds for those longer
    than max_length."""

    texts: pa.ChunkedArray
    row: np.ndarray
    labels: np.ndarray | None = None
    tokens: np.ndarray | None = None
    cut: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Texts:
    """The distinct texts of all splits: `numbers[split]` (rows,) says which text a row has, `texts[number]`
    is the text."""

    numbers: dict[str, np.ndarray]
    texts: pa.Array

    def __len__(self) -> int:
        return len(self.texts)

    def first_row(self, split: str, rows: Rows) -> np.ndarray:
        """(texts,) the number of the first row of a split that has a text; -1 for none."""
        first = np.full(len(self), -1, np.int64)
        first[self.numbers[split][::-1]] = rows.row[::-1]
        return first

    def excerpt(self, number: int) -> str:
        """The beginning of a text, on one line."""
        return shorten(self.texts[int(number)].as_py())


def different_texts(splits: dict[str, Rows]) -> Texts:
    """Number the distinct texts of all splits, compared character by character."""
    import pyarrow as pa

    chunks = [chunk.cast(pa.large_string()) for rows in splits.values() for chunk in rows.texts.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    ends = np.cumsum([len(rows) for rows in splits.values()])
    parts = np.split(np.asarray(encoded.indices), ends[:-1])
    return Texts(dict(zip(splits, parts, strict=True)), encoded.dictionary)


def shorten(text: str) -> str:
    """At most `EXCERPT` characters of a text, on one line."""
    line = " ".join(text.replace("\x1f", " | ").split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def plain(value: Any) -> Any:
    """A numpy number or array as Python's own, for JSON."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
