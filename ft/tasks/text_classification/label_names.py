"""Label names that are likely mistakes: of missing values, some that look alike, or join several labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

MISSING = "nan null n/a #n/a <na>".split()  # as programs write them; "None" and "NA" may be meant
DELIMITERS = "|;,"  # that a column with several names per row may use


def odd_names(names: Sequence[str]) -> list[str]:
    """Notes for the user about labels that are written like missing values, and about those that differ too
    little."""
    missing = [
        f"WARNING labels: {name!r} looks like a missing value, but is learned as a label; if it is none, "
        "empty these cells and set on_bad_rows: drop"
        for name in names
        if name.casefold() in MISSING
    ]
    return [*missing, *_twins(names)]


def _twins(names: Sequence[str]) -> list[str]:
    """Labels that differ only in case, as in a typing error, or that look alike: in a kind of space, or in
    how an accent is encoded, as in files from several programs."""
    twins: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        twins.setdefault(" ".join(plain.split()), []).append(name)
    groups = [some for some in twins.values() if len(some) > 1]
    if not groups:
        return []
    found = [" and ".join(map(_told_apart(some), some)) for some in groups[:3]]
    more = f", and {len(groups) - 3} more" if len(groups) > 3 else ""
    in_case = all(len({name.casefold() for name in some}) == 1 for some in groups)
    what = "in case" if in_case else "in case, spaces or the form of letters"
    return [f"WARNING labels: {', '.join(found)}{more} differ only {what}, and are different labels"]


def _told_apart(names: list[str]) -> Callable[[str], str]:
    """How to show some names: by their codes, if some look the same otherwise."""
    shown = {unicodedata.normalize("NFC", repr(name)) for name in names}
    return repr if len(shown) == len(names) else ascii


def joined_notes(names: Sequence[str]) -> list[str]:
    """Notes for the user about a delimiter that seems to join several labels into one name ("a|b" beside "a"
    and "b")."""
    for delimiter in DELIMITERS:
        parts = [name.split(delimiter) for name in names]
        joined = [pieces for pieces in parts if len(pieces) > 1]
        single = {pieces[0].strip() for pieces in parts if len(pieces) == 1}
        if any(all(piece.strip() in single for piece in pieces) for pieces in joined):
            return [
                f"some labels look like several ones with {delimiter!r} between them; label_delimiter: "
                f"{delimiter!r} would learn them one by one"
            ]
    return []
