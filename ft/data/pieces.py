"""What the model sees of a long text: its beginning, its beginning and end, or overlapping windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OVERLAP = 4  # windows share a fourth of their text with the one before
HEAD = 4  # head_tail keeps a fourth from the beginning


@dataclass(frozen=True)
class Cut:
    """Texts of more than `max_length` tokens, including special tokens, are cut as `long_text` says:
    truncate, head_tail, or windows, at most `max_windows` per text."""

    max_length: int
    long_text: str = "truncate"
    max_windows: int = 1

    def pieces(self, ids: list[int], prefix: list[int], suffix: list[int]) -> list[list[int]]:
        """A text that is too long, in pieces of `max_length` tokens, each between the special tokens.

        truncate gives one, the beginning. head_tail gives one: the first quarter and, from the end, the rest,
        as Sun, Qiu, Xu and Huang ("How to Fine-Tune BERT for Text Classification?", 2019) found best. windows
        gives several that overlap by a quarter; the last one ends where the text does, unless `max_windows`
        is reached before."""
        body = ids[len(prefix) : len(ids) - len(suffix)]
        room = self.max_length - len(prefix) - len(suffix)
        if self.long_text == "truncate":
            parts = [body[:room]]
        elif self.long_text == "head_tail":
            head = room // HEAD
            parts = [body[:head] + body[len(body) - (room - head) :]]
        else:
            last = len(body) - room
            begins = [*range(0, last, room - room // OVERLAP), last]
            parts = [body[begin : begin + room] for begin in begins[: self.max_windows]]
        return [prefix + part + suffix for part in parts]

    def loses(self, full_length: int, specials: int) -> bool:
        """Whether the model does not see the whole of a text with so many tokens."""
        if self.long_text != "windows":
            return full_length > self.max_length
        room = self.max_length - specials
        return full_length - specials > room + (self.max_windows - 1) * (room - room // OVERLAP)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after one text."""
    around, one = (tokenizer(text)["input_ids"] for text in ("", "a"))
    before = 0
    while before < len(around) and around[before] == one[before]:
        before += 1
    return around[:before], around[before:]
