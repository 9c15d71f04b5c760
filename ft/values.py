"""Option values given as short strings: names, durations, weights by label; and how messages show values."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ft.errors import UserError


def split_names(value: list[str] | str | None) -> list[str]:
    """A list of names from a list or from a comma-separated string."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else (value or [])
    return [part for part in parts if part.strip()]


def is_installed(module: str) -> bool:
    """Whether such a module can be imported. (A folder of that name, such as W&B's, does not count.)"""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def precision_name(launched: str) -> str:
    """The usual name of a mixed precision of Accelerate's, where "no" means none."""
    return "fp32" if launched == "no" else launched


def scalars(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers among some metrics, without the tables."""
    return {key: value for key, value in values.items() if value is None or isinstance(value, int | float)}


def first_of(count: int, shown: Sequence[str]) -> str:
    """ "3, 17 and 40 more": the first of so many things."""
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table for the terminal, with the columns in `left` on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n in left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def short(value: float, digits: int = 4, sign: str = "") -> str:
    """A metric for display: with a fixed number of decimals, or, if it is too small for them, three
    significant digits; with `sign`, a plus before one that is not negative."""
    is_small = 0 < abs(value) < 10.0 ** (1 - digits)
    return f"{value:{sign}.3g}" if is_small else f"{value:{sign}.{digits}f}"


def parse_duration(key: str, text: str | None) -> float | None:
    """Seconds in a duration such as "90", "90s", "45m" or "11h30m"; None for None. `key` names it in an
    error."""
    if text is None:
        return None
    units = f"{text}s" if str(text).isdecimal() else str(text)
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", units.strip())
    hours, minutes, seconds = (int(group or 0) for group in match.groups()) if match else (0, 0, 0)
    if not hours + minutes + seconds:
        raise UserError(f'{key}: found {text!r}, expected a duration such as "90s", "45m" or "11h30m".')
    return 3600.0 * hours + 60 * minutes + seconds


def parse_weights(key: str, value: dict[str, float] | str | None) -> dict[str, float] | str:
    """ "none", "balanced", or weights by label, from a mapping, a JSON object or "a=2,b=0.5"; null is none.
    `key` names it in an error."""
    if value is None or value in ("none", "balanced"):
        return value or "none"
    weights: dict[str, float] = {}
    for name, number in _pairs(key, value):
        try:
            weight = float(number)
        except (TypeError, ValueError):
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"{key}: {name!r} has the weight {number!r}, expected a finite number above 0.")
        if str(name) in weights:
            raise UserError(f"{key}: {name!r} has two weights; keep one.")
        weights[str(name)] = weight
    return weights


def _pairs(key: str, value: dict[str, float] | str) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value, object_pairs_hook=list)
        except ValueError as error:  # including a number with thousands of digits
            raise UserError(f"{key}: found {value[:200]!r}, which is not valid JSON: {error}.") from None
    pairs = []
    for part in value.split(","):
        name, equals, number = part.rpartition("=")
        if not equals:
            raise UserError(
                f"{key}: found {value!r}, expected none, balanced, or weights by label such as "
                '"good=1,bad=2.5" (as JSON where a name holds a comma).'
            )
        pairs.append((name.strip(), number.strip()))
    return pairs
