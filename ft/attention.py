"""Attention with row-keyed dropout on its probabilities, as one of Transformers' attention functions.

On a CPU, it has its own backward pass, and processes many long texts a few rows at a time, as in
FlashAttention (Dao et al., 2022): of the intermediate results, which grow with the square of the length, only
the probabilities are then stored, and of no more rows than a bound allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ft.dropout import RowKeys, drop_and_scale, threshold_of
from ft.layers import always_mask

ATTENTION_NAME = "row_keyed"  # in Transformers' registry of attention functions
# Bytes of a layer's scores:
WHOLE = 2**24  # up to this many are computed at once, and the results kept for the backward pass
TILE = 2**22  # beyond, this many at a time, which the passes over them then find in a cache
HELD = 2**29  # of the probabilities of these, this many are kept, and the others recomputed


def install_attention(model: nn.Module, rows: RowKeys, longest: int | None = None) -> dict[int, str]:
    """Register the attention function and its mask function, and select it if the model uses sdpa, before the
    model is moved or wrapped; returns the name of each layer. `longest` is the maximum number of tokens that
    a compiled model will see."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager", ATTENTION_NAME):
        return {}
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attend)
    if not getattr(model, "_supports_sdpa", False):
        return {}
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    names = {}
    for number, (path, module) in enumerate(model.named_modules()):
        module.row_keys, module.dropout_place, module.longest = rows, rows.place(-1 - number), longest
        names[-1 - number] = path
    return names


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function with row-keyed dropout on the probabilities; sdpa if there is no
    dropout.

    query (rows, heads, queries, size), key and value (rows, key heads, keys, size); returns (rows, queries,
    heads, size)."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    rows = getattr(module, "row_keys", None)
    if not dropout or rows is None:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias  # older versions do not know it
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    shape = (*query.shape[:3], key.shape[2])  # of the scores
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
    place: Any = module.dropout_place
    learned = position_bias is not None or (attention_mask is not None and attention_mask.requires_grad)
    if _in_fp32_on_cpu(query, key, value) and not learned and rows.come_first(place, shape[0]):
        salt = rows.salt(place, rows.next_use(place, shape))
        found = _OnCpu.apply(value, dropout, scaling, rows, query, key, attention_mask, rows.keys, salt)
        return found.transpose(1, 2), None
    # The cost is passes over the scores: the queries are scaled instead, and the mask is applied in place
    # (1.03 to 1.09 times as fast at 256 tokens).
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = masked(scores, attention_mask)
    if torch.compiler.is_compiling() and module.longest is not None:
        # A softmax in one pass: 35.4 ms per update instead of 38.1, of 128 x 128 tokens on an H100.
        torch._check(scores.shape[-1] <= module.longest)  # type: ignore[operator]
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities, value = drop_and_scale(probabilities, value, rows, dropout, place)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


def install_masks(model: nn.Module, is_compiled: bool = False) -> None:
    """Keep Transformers from reading the padding mask during training. Its mask functions do so to drop a
    mask that masks nothing, and the host would wait for the device in every update. The loader already knows:
    its batches without padding come without a mask, which is then left out (1.06 times at 256 tokens, on a
    CPU).

    Without a mask, some models look for padding, to warn of it, and decoders for packed sequences. A compiled
    model always has a mask, in evaluations, too: without one, it would need another program."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, function in (("eager", eager_mask), ("sdpa", sdpa_mask), (ATTENTION_NAME, sdpa_mask)):
        AttentionMaskInterface.register(name, partial(_unread, function, is_compiled))
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _say_nothing  # type: ignore[assignment]
    if any(getattr(module, "is_causal", False) is True for module in model.modules()):
        always_mask(model)


def _say_nothing(*_: Any) -> None:
    pass


def _unread(
    function: Callable[..., torch.Tensor | None], is_compiled: bool, **options: Any
) -> torch.Tensor | None:
    if (is_compiled or torch.is_grad_enabled()) and options.get("attention_mask") is not None:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return function(**options)


def masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The masked scores: in place, except for a mask that is added as it is, which may need a gradient of its
    own."""
    if mask.dtype != torch.bool:
        return scores + mask
    lowest = torch.finfo(scores.dtype).min / 2  # half of it, so that no sum is infinite
    return scores.add_(torch.where(mask, 0.0, lowest).to(scores.dtype))


def _in_fp32_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether `_OnCpu` may attend. (A GPU has compiled layers or flash attention.) Under autocast, queries
    and keys may be fp32 where the values are not."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


class _OnCpu(torch.autograd.Function):
    """Attention in fp32: from values (rows, heads, keys, value size) and the arguments of `_Scores` to (rows,
    heads, queries, value size).

    If a layer has many scores, it processes a few rows at a time, and redraws their dropout in the backward
    pass. The probabilities of the first rows are stored, those of the others recomputed: so more rows, or
    longer ones, never need less memory, on which the preflight relies, except for 16 MB a layer: up to
    `WHOLE`, the probabilities after dropout are stored, too.

    The backward pass needs neither that of the softmax nor the dropout's mask: what softmax subtracts from
    each row of the scores' gradients is the sum of gradient times output (FlashAttention, algorithm 4).

    Speed-ups of attention, each against the version before it: the backward pass 1.1 to 1.17 at 24 to 480
    tokens, products without copies 1.03 to 1.17, stored probabilities 1.21 to 1.25 at 480."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, dropout: float, scaling: float, rows: RowKeys, query: torch.Tensor,
        key: torch.Tensor, *others: Any,
    ) -> torch.Tensor:  # fmt: skip
        # The memory layout for products of many heads: matmul would copy them for each.
        value, query, key = value.contiguous(), query.contiguous(), key.contiguous()
        scores = _Scores(dropout, scaling, rows, query, key, *others)
        count, *of_row = scores.shape
        size = 4 * math.prod(of_row)  # bytes of scores of a row
        whole = count * size <= WHOLE
        ctx.tiles = _tiles(count, count if whole else max(1, TILE // size))
        most_held = 0 if whole or not any(ctx.needs_input_grad) else HELD // size
        held, held_dropped = query.new_empty(min(count, most_held), *of_row), None
        # In the memory layout that the layer needs next.
        found = query.new_empty(count, of_row[1], of_row[0], value.shape[3]).transpose(1, 2)
        for tile in ctx.tiles:
            probabilities = scores.probabilities(tile, held[tile] if tile.stop <= len(held) else None)
            dropped = scores.dropped(tile, probabilities)
            found[tile] = _product(dropped, value[tile], 1 / (1 - dropout))
        if whole:  # in one tile
            held, held_dropped = probabilities, dropped
        ctx.options = dropout, scaling, rows
        ctx.save_for_backward(query, key, *others, value, found, held, held_dropped)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Read once: torch.utils.checkpoint gives them only once.
        *of_scores, value, found, held, held_dropped = ctx.saved_tensors
        scores = _Scores(*ctx.options, *of_scores)
        query, key, scaling, upscaling = scores.query, scores.key, scores.scaling, 1 / (1 - scores.dropout)
        by_query, by_key, by_value = (torch.empty_like(one) for one in (query, key, value))
        taken_off = (gradient * found).sum(dim=-1, keepdim=True)
        gradient = gradient.contiguous()
        for tile in ctx.tiles:
            probabilities = held[tile] if tile.stop <= len(held) else scores.probabilities(tile)
            dropped = scores.dropped(tile, probabilities) if held_dropped is None else held_dropped
            _product(dropped.transpose(2, 3), gradient[tile], upscaling, by_value[tile])
            by_scores = _product(gradient[tile], value[tile].transpose(2, 3), upscaling).mul_(dropped)
            by_scores.addcmul_(probabilities, taken_off[tile], value=-1)
            _product(by_scores, key[tile], scaling, by_query[tile])
            _product(by_scores.transpose(2, 3), query[tile], scaling, by_key[tile])
        return by_value, None, None, None, by_query, by_key, None, None, None


def _tiles(rows: int, step: int) -> list[slice]:
    """The rows, `step` at a time."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class _Scores:
    """Scores of queries and keys (rows, heads, tokens, size), and what is computed from those of a tile of
    rows: with a mask, and with the dropout given by the keys of the rows and its table's salt (`RowKeys`)."""

    dropout: float
    scaling: float
    rows: RowKeys
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    row_keys: torch.Tensor
    salt: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, heads, queries, keys)."""
        return (*self.query.shape[:3], self.key.shape[2])

    def probabilities(self, tile: slice, to: torch.Tensor | None = None) -> torch.Tensor:
        """The softmax of the scores, written to `to`."""
        scores = _product(self.query[tile], self.key[tile].transpose(2, 3), self.scaling)
        if self.mask is not None:
            of_rows = self.mask.dim() == 4 and len(self.mask) > 1
            scores = masked(scores, self.mask[tile] if of_rows else self.mask)
        return torch.softmax(scores, dim=-1, out=to)

    @cached_property
    def _table(self) -> torch.Tensor:
        """The dropout's (heads, queries, keys), as large as the scores of a row."""
        return self.rows.table(self.salt, self.shape[1:])

    def dropped(self, tile: slice, probabilities: torch.Tensor) -> torch.Tensor:
        """The probabilities of a tile, with dropped ones zeroed."""
        # The bits of a float times 0 or 1. A byte mask, which torch must first convert to floats, takes 1.5
        # times as long.
        kept = (self.row_keys[tile].view(-1, 1, 1, 1) * self._table).ge_(threshold_of(self.dropout))
        return kept.mul_(probabilities.view(torch.int32)).view(torch.float32)


def _product(
    left: torch.Tensor, right: torch.Tensor, factor: float, to: torch.Tensor | None = None
) -> torch.Tensor:
    """`factor` times the matrix product of each head of each row, (rows, heads, m, k) by (rows, heads, k, n),
    written to `to`, which is contiguous. The factor is free there; applied separately, it would be a pass
    over memory."""
    if to is None:
        to = left.new_empty(*left.shape[:3], right.shape[3])
    to.view(-1, *to.shape[2:]).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=factor)
    return to
