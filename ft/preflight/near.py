"""Near copies: texts whose five-character shingles are mostly the same, found with MinHash (datasketch).

MinHash and its index of bands (Broder, 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
chapter 3) give candidates, whose true Jaccard similarity then decides. Characters instead of words, so that
texts of a few words and languages without spaces work, too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ft.preflight.duplicates import count_rows, pairs_of
from ft.preflight.rows import EXAMPLES, Rows, Texts

SHINGLE = 5  # characters
THRESHOLD = 0.7  # Jaccard similarity
BANDS, BAND_ROWS = 25, 5  # finds 99 % of the pairs at the threshold, 99.99 % of those at 0.8
MOST_TEXTS = 200_000  # distinct ones; more are sampled
BLOCK = 20_000  # texts in the index at a time, so that it takes 200 MB at most
# Texts that share much, such as a disclaimer, are candidates of one another by the thousand. Per split,
# MOST_SHARED of a band are looked at; of those with at least LEAST_ALIKE of their hashes equal (five
# deviations below the threshold), the MOST_COMPARED most alike are compared with one text.
MOST_SHARED, MOST_COMPARED, LEAST_ALIKE = 20, 100, 0.5


def near_copies(texts: Texts, splits: dict[str, Rows], most: int = MOST_TEXTS) -> dict[str, Any]:
    """How many rows of a split have a near copy (not an exact one) in it ("within") or in a split that was
    seen before it ("across", under "test in train"), with the first of them: [row, row that it resembles],
    and their texts.

    Of more than `most` distinct texts, only a sample is compared; "compared" and "texts" say how many."""
    chosen = _sample(texts, most)
    wanted = [(split, split) for split in splits] + pairs_of(list(splits))
    there = {split: np.isin(np.arange(len(texts)), numbers) for split, numbers in texts.numbers.items()}
    partner = {pair: np.full(len(texts), -1) for pair in wanted}  # the near copy found for each text
    shingles = lru_cache(50_000)(lambda number: shingles_of(texts.texts[number].as_py()))
    for number, candidates in _candidates(texts, chosen, list(there.values())):
        for (one, other), found in partner.items():
            if found[number] >= 0 or not there[one][number]:
                continue
            inside = sorted([c for c in candidates if there[other][c]][:MOST_COMPARED])
            found[number] = next(
                (c for c in inside if jaccard(shingles(number), shingles(c)) >= THRESHOLD), -1
            )
    within, across = {}, {}
    for (one, other), found in partner.items():
        copy = found[texts.numbers[one]]  # (rows,)
        row = np.where(copy >= 0, texts.first_row(other, splits[other])[copy], -1)
        counted = count_rows(copy >= 0, splits[one], row)
        known = [(n, int(found[n])) for n in dict.fromkeys(texts.numbers[one][copy >= 0].tolist())]
        counted["texts"] = [[texts.excerpt(a), texts.excerpt(b)] for a, b in known[:EXAMPLES]]
        if one == other:
            within[one] = counted
        else:
            across[f"{one} in {other}"] = counted
    return {
        "similarity": f"Jaccard of {SHINGLE}-character shingles, case and white space levelled",
        "threshold": THRESHOLD, "texts": len(texts), "compared": len(chosen),
        "within": within, "across": across,
    }  # fmt: skip


def sample_note(near: dict[str, Any]) -> str:
    """A note on the numbers of `near_copies` if not all texts were compared; empty if they were."""
    if near["compared"] == near["texts"]:
        return ""
    return f"counted in a sample of {near['compared']:,} of the {near['texts']:,} different texts"


def shingles_of(text: str) -> np.ndarray:
    """The distinct hashes (uint32, sorted) of the five-character shingles of a text; a shorter one is a
    single shingle."""
    level = " ".join(text.casefold().split())
    characters = np.frombuffer(level.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    width = min(SHINGLE, len(characters))
    hashes = np.zeros(len(characters) - width + 1, np.uint64)
    for offset in range(width):  # a polynomial of the characters, modulo 2**64
        # Multiplied last, so that the last character reaches the upper bits, too.
        hashes = (hashes + characters[offset : offset + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The Jaccard similarity of two sets (each sorted, without repeats)."""
    if THRESHOLD * max(len(one), len(other)) > min(len(one), len(other)):
        return 0.0  # their sizes alone keep them below the threshold
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _candidates(
    texts: Texts, chosen: np.ndarray, splits: list[np.ndarray]
) -> Iterator[tuple[int, list[int]]]:
    """For each chosen text, the numbers of texts that share a band with it, the most alike first; once for
    every block of the index. `splits` say for each text (texts,) whether it is in a split."""
    from datasketch import MinHash, MinHashLSH

    sizes = {"num_perm": BANDS * BAND_ROWS, "scheme": "affine32"}
    hashes = (shingles_of(texts.texts[number].as_py()).tolist() for number in chosen)
    signatures = list(MinHash.bulk(hashes, hashfunc=int, **sizes))
    values = np.stack([signature.hashvalues for signature in signatures])
    for begin in range(0, len(chosen), BLOCK):
        index = MinHashLSH(num_perm=BANDS * BAND_ROWS, params=(BANDS, BAND_ROWS))
        for number, signature in zip(chosen[begin : begin + BLOCK], signatures[begin:], strict=False):
            index.insert(int(number), signature, check_duplication=False)
        for table in index.hashtables:
            _shorten(table, splits)
        for number, signature in zip(chosen, signatures, strict=True):
            found = np.array(sorted(c for c in index.query(signature) if c != number), np.int64)
            if len(found):
                alike = (values[np.searchsorted(chosen, found)] == signature.hashvalues).mean(axis=1)
                order = np.argsort(-alike, kind="stable")
                yield int(number), found[order[alike[order] >= LEAST_ALIKE]].tolist()


def _shorten(table: Any, splits: list[np.ndarray]) -> None:
    """Keep only the first texts of each split in each bucket of a band."""
    for key in [key for key, count in table.itemcounts().items() if count > MOST_SHARED]:
        numbers = sorted(table.get(key))
        table.remove(key)
        for there in splits:
            table.insert(key, *[number for number in numbers if there[number]][:MOST_SHARED])


def _sample(texts: Texts, most: int) -> np.ndarray:
    """Numbers of at most `most` texts: those of the evaluation splits first, where a copy does harm, and a
    random sample of the others."""
    if len(texts) <= most:
        return np.arange(len(texts))
    scored = [numbers for split, numbers in texts.numbers.items() if split != "train"]
    first = np.unique(np.concatenate([*scored, np.zeros(0, np.int64)])).astype(np.int64)
    generator = np.random.default_rng(0)
    first = generator.permutation(first)[: most // 2]
    others = generator.permutation(np.setdiff1d(np.arange(len(texts)), first))
    return np.sort(np.concatenate([first, others[: most - len(first)]]))
