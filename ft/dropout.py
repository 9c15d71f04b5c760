"""Dropout masks as a function of (seed, update, layer, row, position, unit), and of nothing else.

A mask element is kept if `key[row] * table[position, unit] >= threshold` in wrapping 32-bit integers. `key`
is an odd hash of (seed, update, row id); `table`, of the shape of one row, holds odd hashes of (update,
layer, position, unit). So the mask does not depend on the micro-batch, the padding, the process or the
device, and costs one multiplication and one comparison per element. The last steps of the hashes are those of
MurmurHash3 (Appleby, 2011) and SplitMix64 (Steele, Lea and Flood, 2014).

Measured (two CPU threads, 24 to 256 tokens, in turn with torch's own dropout, which draws random numbers): at
most 0.36 of its time on hidden states; an attention layer with it is 1.1 to 1.8 times as fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import nn

from ft.errors import UserError

ROWLESS, UNKEYED = -1, -2  # a tensor that all rows share; one whose rows cannot be found


class Place:
    """One dropout of the model, and how often it was used in this forward pass.

    `axes` says which axis of its input holds the rows, for the n-th use if that is not the first dimension:
    an axis, ROWLESS or UNKEYED. `shapes` are the inputs seen last, by use. `number` (1,) int64 is its index
    among the places."""

    def __init__(self, layer: int, number: int) -> None:
        self.layer, self.number = layer, torch.tensor([number])
        self.uses = 0
        self.axes: dict[int, int] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}


class RowKeys:
    """The rows that the model is processing: one object per model, set before every forward pass. Whatever
    changes with the update is a tensor on the device, so that a compiled model is compiled only once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys: torch.Tensor | None = None
        self.places: list[Place] = []
        self._layers = torch.zeros(0, dtype=torch.int64)
        self._salts = torch.zeros(0, 2, dtype=torch.int64)
        self._coordinates: dict[int, torch.Tensor] = {}

    def set(self, update: int, row_ids: torch.Tensor) -> None:
        """Set the update and the rows (rows,) int64 of the next forward pass."""
        state = _signed(_scramble(self.seed, update))
        self.keys = _mix64(row_ids + state).to(torch.int32) | 1
        if self._salts.device != row_ids.device or len(self._salts) < len(self.places):  # once
            self._move(row_ids.device)
        # What makes this update's tables specific to a layer: (places, 2), see `_salted`.
        self._salts = _salted(_step(self._layers ^ state))
        for place in self.places:
            place.uses = 0

    def place(self, layer: int) -> Place:
        """Register a dropout, before the first pass."""
        self.places.append(Place(layer, len(self.places)))
        return self.places[-1]

    def _move(self, device: torch.device) -> None:
        self._layers = torch.tensor([place.layer for place in self.places], dtype=torch.int64, device=device)
        self._coordinates = {n: table.to(device) for n, table in self._coordinates.items()}
        for place in self.places:
            place.number = place.number.to(device)

    def reserve(self, shape: Sequence[int]) -> torch.Tensor:
        """The hashes of all coordinates of a table of `shape`, or of a larger one: cached, and grown when
        needed, which compiled code should not have to do."""
        cached = self._coordinates.get(len(shape))
        if cached is not None:
            if all(have >= want for have, want in zip(cached.shape, shape, strict=True)):
                return cached
            shape = [max(sizes) for sizes in zip(cached.shape, shape, strict=True)]
        self._coordinates[len(shape)] = _coordinate_hash(shape, self._layers.device)
        return self._coordinates[len(shape)]

    def mask(self, place: Place, shape: Sequence[int], threshold: int) -> torch.Tensor | None:
        """Which elements of a tensor of `shape`, all its dimensions, are kept: bool; None if its rows cannot
        be found."""
        assert self.keys is not None, "RowKeys.set must name the rows of this pass"
        use, shape = self.next_use(place, shape), tuple(shape)
        axis, salt = place.axes.get(use, 0), self.salt(place, use)
        if axis == ROWLESS:
            return self.table(salt, shape) >= threshold
        if axis == UNKEYED or shape[axis] != len(self.keys):
            return None
        table = self.table(salt, shape[:axis] + shape[axis + 1 :]).unsqueeze(axis)
        return self.keys.view(-1, *[1] * (len(shape) - axis - 1)) * table >= threshold

    def come_first(self, place: Place, size: int) -> bool:
        """Whether the next use of a dropout has these rows in its first dimension, of `size`."""
        return place.axes.get(place.uses, 0) == 0 and self.keys is not None and len(self.keys) == size

    def next_use(self, place: Place, shape: Sequence[int]) -> int:
        """Count a use of a dropout, on a tensor of `shape`, and return how many there were before it in this
        pass: ALBERT's is used at every depth, each time with another mask."""
        use, place.uses = place.uses, place.uses + 1
        if not torch.compiler.is_compiling():
            place.shapes[use] = tuple(shape)
        return use

    def recomputed(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch.utils.checkpoint: recomputed activations get the same masks again."""
        return nullcontext(), self._from([place.uses for place in self.places])

    @contextmanager
    def _from(self, uses: list[int]) -> Iterator[None]:
        after = [place.uses for place in self.places]
        for place, use in zip(self.places, uses, strict=True):
            place.uses = use
        try:
            yield
        finally:
            for place, use in zip(self.places, after, strict=True):
                place.uses = use

    def salt(self, place: Place, use: int) -> torch.Tensor:
        """Distinguishes the table of a layer, of one of its uses and of the update from all others: (2,)
        int32."""
        salt = self._salts.index_select(0, place.number)[0]
        return (salt if use == 0 else _salted(_step(salt[0] ^ use))).to(torch.int32)

    def table(self, salt: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Odd int32 numbers of `shape`."""
        table = self.reserve(shape)[tuple(slice(size) for size in shape)] ^ salt[0]
        table *= salt[1]
        table ^= table >> 15
        table *= -2048144789  # 0x85ebca6b
        return table.bitwise_or_(1)


class RowKeyedDropout(nn.Module):
    """Replaces an `nn.Dropout`; holds no weights."""

    def __init__(self, p: float, layer: int, rows: RowKeys) -> None:
        super().__init__()
        self.p, self.place, self.rows = p, rows.place(layer), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with masked elements zeroed and the others divided by 1 - p; unchanged in evaluation."""
        if not self.training or self.p == 0:
            return x
        return drop(x, self.rows, self.p, self.place)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"p={self.p}, layer={self.place.layer}"


def drop(x: torch.Tensor, rows: RowKeys, p: float, place: Place) -> torch.Tensor:
    """`x` with masked elements zeroed and the others divided by 1 - p."""
    kept = rows.mask(place, x.shape, threshold_of(p))
    return nn.functional.dropout(x, p) if kept is None else _masked(x, kept, 1 / (1 - p))


def drop_and_scale(
    x: torch.Tensor, y: torch.Tensor, rows: RowKeys, p: float, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the product of `x` and `y`; the smaller, `y`, is the one divided."""
    kept = rows.mask(place, x.shape, threshold_of(p))
    return (nn.functional.dropout(x, p), y) if kept is None else (_masked(x, kept, 1.0), y * (1 / (1 - p)))


def threshold_of(p: float) -> int:
    """The smallest int32 that is kept, so that an element is kept with probability 1 - p. Raises `UserError`
    unless p is from 0 to below 1: otherwise there is nothing to scale by 1 / (1 - p)."""
    if not 0 <= p < 1:
        where = "config_overrides, or config.json of the model"
        raise UserError(f"{where}: found a dropout of {p:g}, expected from 0 to below 1.")
    return round(p * 2**32) - 2**31


def _masked(x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return x * kept * scale  # fused with what is around it; the compiler chooses what to keep
    return _Masked.apply(x, kept, scale)


class _Masked(torch.autograd.Function):
    """x * mask * scale. Plain autograd would keep a float copy of the mask; this keeps the bool one.

    torch multiplies by bytes in 0.6 of the time that it needs for the same bytes as bool, on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        kept = mask.view(torch.uint8)
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _scaled(torch.mul(x, kept), scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _scaled(torch.mul(gradient, ctx.saved_tensors[0]), ctx.scale), None, None


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x.mul_(scale)


def install(model: nn.Module, rows: RowKeys) -> dict[int, str]:
    """Replace the model's own dropout with row-keyed dropout; returns the name of each layer."""
    names, numbers = {}, count()
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                layer = next(numbers)
                names[layer] = f"{path}.{name}".lstrip(".")
                setattr(module, name, RowKeyedDropout(child.p, layer, rows))
    return names


def _scramble(*numbers: int) -> int:
    """A 64-bit hash of small whole numbers (SplitMix64 over each in turn), on the host."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state


def _step(x: torch.Tensor) -> torch.Tensor:
    """A step of `_scramble` on the device: hashes (...) int64 of what was mixed by xor."""
    return _mix64(x + _signed(0x9E3779B97F4A7C15))


def _salted(states: torch.Tensor) -> torch.Tensor:
    """(..., 2) int64 of hashes (...): each, and an odd number that goes with it."""
    return torch.stack((states, _step(states) | 1), dim=-1)


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - 2**64 if number >> 63 else number


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, element by element; torch's shift extends the sign, so the high bits
    are masked off."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _coordinate_hash(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 hashes of the coordinates in `shape`; those of a smaller shape are a corner of them."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for axis, size in enumerate(shape):
        place = torch.arange(size, device=device).view(-1, *[1] * (len(shape) - axis - 1))
        total = _mix64(total + place + _signed(_scramble(axis)))
    return total.to(torch.int32)
