"""Dropout masks as a function of (seed, update, layer, row, position, unit), and of nothing else.

A mask element is kept where `key[row] * table[position, unit] >= threshold` in wrapping 32-bit integers.
`key` is an odd hash of (seed, update, row id), `table` one row's shape of odd hashes of (update, layer,
position, unit). So the mask does not depend on the micro-batch, the padding, the process or the device, and
costs one multiplication and one comparison an element, less than drawing random numbers. The last steps of
the hashes are those of MurmurHash3 (Appleby, 2011) and SplitMix64 (Steele, Lea and Flood, 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION_NAME = "row_keyed"  # in Transformers' registry of attention functions


class RowKeys:
    """The rows that the model is looking at: one object for a model, set before every forward pass."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.update = 0
        self.keys: torch.Tensor | None = None
        self._coordinates: dict[tuple, torch.Tensor] = {}

    def set(self, update: int, row_ids: torch.Tensor) -> None:
        """Name the update and the rows (rows,) int64 of the next forward pass."""
        self.update = update
        self.keys = _mix64(row_ids + _signed(_scramble(self.seed, update), 64)).to(torch.int32) | 1

    def mask(
        self, layer: int, shape: Sequence[int], threshold: int, device: torch.device, per_row: bool = True
    ) -> torch.Tensor:
        """Which elements of a (rows, ...) tensor are kept: bool. `shape` names all its dimensions. With
        `per_row` off it is a tensor that all rows share, such as DeBERTa's embeddings of distances."""
        if not per_row:
            return self._table(layer, tuple(shape), device) >= threshold
        assert self.keys is not None and len(self.keys) == shape[0], (
            "RowKeys.set must name the rows of this pass"
        )
        table = self._table(layer, tuple(shape[1:]), device)
        return self.keys.view(-1, *[1] * table.dim()) * table >= threshold

    def _table(self, layer: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Odd int32 numbers of `shape`, fresh for every layer and update."""
        cached = self._coordinates.get((len(shape), device))
        if cached is None or any(have < want for have, want in zip(cached.shape, shape, strict=True)):
            cached = self._coordinates[len(shape), device] = _coordinate_hash(shape, device)
        first = _scramble(self.seed, self.update, layer)
        table = cached[tuple(slice(size) for size in shape)] ^ _signed(first, 32)
        table *= _signed(_scramble(first) | 1, 32)
        table ^= table >> 15
        table *= -2048144789  # 0x85ebca6b
        return table.bitwise_or_(1)


class RowKeyedDropout(nn.Module):
    """In the place of an `nn.Dropout` on tensors whose first dimension is the rows, or, with `per_row` off,
    on tensors without rows; holds no weights."""

    def __init__(self, p: float, layer: int, rows: RowKeys) -> None:
        super().__init__()
        self.p, self.layer, self.rows = p, layer, rows
        self.per_row = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (rows, ...) with masked elements zeroed and the others divided by 1 - p; unchanged in
        evaluation."""
        if not self.training or self.p == 0:
            return x
        return _drop(x, self.rows, self.p, self.layer, self.per_row)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"p={self.p}, layer={self.layer}"


def _drop(x: torch.Tensor, rows: RowKeys, p: float, layer: int, per_row: bool = True) -> torch.Tensor:
    threshold = round(p * 2**32) - 2**31
    return _Masked.apply(x, rows.mask(layer, x.shape, threshold, x.device, per_row), 1 / (1 - p))


class _Masked(torch.autograd.Function):
    """x * mask * scale. Plain autograd would keep a float copy of the mask; this keeps the bool one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return torch.mul(x, mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.mul(gradient, ctx.saved_tensors[0]).mul_(ctx.scale), None, None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function with row-keyed dropout on the probabilities; sdpa where there is none.

    query (rows, heads, queries, size), key and value (rows, key heads, keys, size); gives (rows, queries,
    heads, size)."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    rows = getattr(module, "row_keys", None)
    if not dropout or rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * (
        query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    elif kwargs.get("is_causal", getattr(module, "is_causal", False)) and query.shape[2] > 1:
        ones = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = _drop(probabilities, rows, dropout, module.attention_layer)  # type: ignore[arg-type]
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


def key_dropout(model: nn.Module, mode: str, seed: int, compiled: bool) -> tuple[RowKeys, list[str]]:
    """Install what `dropout_mode` asks for; with torch's own dropout the keys are there, but nothing reads
    them."""
    if mode == "torch":
        return RowKeys(seed), ["all dropout is torch's (dropout_mode: torch)"]
    rows, unkeyed = install(model, seed)
    if compiled:
        rows.mask = torch.compiler.disable(rows.mask)  # type: ignore[method-assign]  # the update's number is no constant
    return rows, unkeyed


def install(model: nn.Module, seed: int) -> tuple[RowKeys, list[str]]:
    """Give the model row-keyed dropout. Returns the keys to set, and a line for every place that still draws
    random numbers of its own: a dropout on a tensor that has its rows elsewhere than in the first dimension,
    or a kernel with its own generator.

    The model is run on a few short rows to see both, twice, with another number of rows; run it before it is
    moved or wrapped.
    """
    rows = RowKeys(seed)
    _install_attention(model, rows)
    replaced: dict[str, tuple[nn.Module, str, nn.Dropout]] = {}
    for name, module in list(model.named_modules()):
        for child_name, child in module.named_children():
            if type(child) is nn.Dropout:
                layer = len(replaced)
                replaced[f"{name}.{child_name}".lstrip(".")] = (module, child_name, child)
                setattr(module, child_name, RowKeyedDropout(child.p, layer, rows))
    shapes: dict[str, list[set[torch.Size]]] = {}  # that a dropout saw, in each of the probes
    draws: list[str] = []
    for count in PROBE_ROWS:
        seen: dict[str, set[torch.Size]] = {path: set() for path in replaced}

        def look(module: nn.Module, args: tuple, path: str, count: int = count, seen: dict = seen) -> None:
            module.per_row = args[0].shape[0] == count
            seen[path].add(args[0].shape)

        handles = [
            getattr(parent, name).register_forward_pre_hook(partial(look, path=path))
            for path, (parent, name, _) in replaced.items()
        ]
        draws += _probe(model, rows, count)
        for handle in handles:
            handle.remove()
        for path, found in seen.items():
            shapes.setdefault(path, []).append(found)
    sideways = []
    for path, (parent, name, original) in replaced.items():
        few, many = shapes[path]
        keyed = getattr(parent, name)
        keyed.per_row = all(
            shape[0] == count for found, count in zip((few, many), PROBE_ROWS, strict=True) for shape in found
        )
        if not keyed.per_row and few != many:
            setattr(parent, name, original)
            sideways.append(path)
    unkeyed = []
    if sideways:
        more = f" and {len(sideways) - 1} more" if len(sideways) > 1 else ""
        unkeyed.append(f"dropout on a tensor whose first dimension is not the rows ({sideways[0]}{more})")
    elsewhere = sorted(set(draws))
    if elsewhere and not unkeyed:
        unkeyed = [f"the model draws random numbers by {', '.join(elsewhere)}"]
    return rows, unkeyed


def _install_attention(model: nn.Module, rows: RowKeys) -> None:
    """Register the attention function and its mask function, and choose it where the model takes sdpa's."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    if not getattr(model, "_supports_sdpa", False):
        return
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    for number, module in enumerate(model.modules()):
        module.row_keys, module.attention_layer = rows, -1 - number  # type: ignore[assignment]


PROBE_ROWS = (3, 7)


class _Draws(TorchDispatchMode):
    """Notes every operator that draws random numbers; torch marks them itself. One that is asked to drop
    with a probability of 0, as attention kernels without dropout are, draws none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            given |= dict(zip(names, args, strict=False)) | (kwargs or {})
            if given.get("dropout_p", given.get("p")) != 0:
                self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _probe(model: nn.Module, rows: RowKeys, count: int) -> list[str]:
    """Names of the random operators of one training pass over `count` rows of five tokens."""
    was_training = model.training
    device = next(model.parameters()).device
    ids = torch.ones((count, 5), dtype=torch.int64, device=device)
    config = getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < getattr(config, "vocab_size", 0):
        ids[:, -1] = end  # BART's classifier reads the token that ends a text
    rows.set(0, torch.arange(count, device=device))
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _Draws() as draws:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return draws.names
    finally:
        model.train(was_training)


def _scramble(*numbers: int) -> int:
    """A 64-bit hash of small whole numbers (SplitMix64 over each in turn), on the host."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state


def _signed(number: int, bits: int) -> int:
    """The low bits of a number as torch's signed integers have them."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, element by element; torch's shift keeps the sign, so the high bits
    go."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _coordinate_hash(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 hashes of the coordinates in `shape`; those of a smaller shape are its corner."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for axis, size in enumerate(shape):
        place = torch.arange(size, device=device).view(-1, *[1] * (len(shape) - axis - 1))
        total = _mix64(total + place + _signed(_scramble(axis), 64))
    return total.to(torch.int32)
