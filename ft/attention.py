"""Attention with row-keyed dropout on its probabilities, as one of Transformers' attention functions.

On a CPU, the backward pass is one of its own, and many long texts are attended to a few rows at a time, as in
FlashAttention (Dao et al., 2022): of the scores, which grow with the square of the length, the probabilities
alone are then held for all rows, and not these if they are too many."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ft.dropout import RowKeys, drop_and_scale, threshold_of

ATTENTION_NAME = "row_keyed"  # in Transformers' registry of attention functions
WHOLE = (
    2**24
)  # bytes of a layer's scores that are computed at once, and held for the backward pass as they are
TILE = 2**22  # bytes of scores at a time, where there are more: several passes over them find them in a cache
HELD = 2**29  # bytes of probabilities that are held, where there are more scores than `WHOLE`


def install_attention(model: nn.Module, rows: RowKeys, longest: int | None = None) -> dict[int, str]:
    """Register the attention function and its mask function, and choose it where the model takes sdpa's,
    before the model is moved or wrapped; returns the name of each layer. `longest` is the most tokens that a
    compiled model will see."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager", ATTENTION_NAME):
        return {}
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
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
    """Transformers' attention function with row-keyed dropout on the probabilities; sdpa where there is none.

    query (rows, heads, queries, size), key and value (rows, key heads, keys, size); gives (rows, queries,
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
        found = _OnCpu.apply(dropout, scaling, rows, query, key, value, attention_mask, rows.keys, salt)
        return found.transpose(1, 2), None
    # Passes over the scores are what this costs: they are scaled as the queries, and masked in place (1.03 to
    # 1.09 times as fast at 256 tokens).
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = _masked(scores, attention_mask)
    if torch.compiler.is_compiling() and module.longest is not None:
        torch._check(scores.shape[-1] <= module.longest)  # type: ignore[operator]  # a softmax in one pass
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities, value = drop_and_scale(probabilities, value, rows, dropout, place)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """Transformers' mask function for sdpa. To leave out a mask that masks nothing, it reads the padding,
    for which the host would wait in every update: on a CPU alone (1.06 times there, at 256 tokens)."""
    from transformers.masking_utils import sdpa_mask

    if torch.is_grad_enabled() and torch.device(options.get("device", "cpu")).type != "cpu":
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **options)


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The scores and what Transformers' mask takes off them, in place where it has no gradient of its own."""
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
    """Attention in fp32: queries, keys and values (rows, heads, tokens, size), a mask, the keys of the rows
    and the salt of the table that make the dropout's (`RowKeys`), to (rows, heads, queries, value size).

    Where the scores of a layer are many, it takes a few rows at a time, and draws their dropout again in the
    backward pass; where they are very many, it computes their probabilities again, too.

    The backward pass does without that of the softmax, and without the dropout's mask: what softmax takes off
    each row of the scores' gradients is the sum of gradient times output (FlashAttention, algorithm 4)."""

    @staticmethod
    def forward(ctx: Any, dropout: float, scaling: float, rows: RowKeys, *tensors: Any) -> torch.Tensor:
        # As products of many heads want them in memory: matmul would copy them for each.
        query, key, value = (tensor.contiguous() for tensor in tensors[:3])
        tensors = (query, key, value, *tensors[3:])
        count, heads, queries, _ = query.shape
        of_row = 4 * heads * queries * key.shape[2]  # bytes of scores
        ctx.options, ctx.tiles = (dropout, scaling, rows), _tiles(count, of_row)
        scores = _Scores(*ctx.options, *tensors)
        # In memory as the layer goes on with it.
        found = query.new_empty(count, queries, heads, value.shape[3]).transpose(1, 2)
        whole, many = count * of_row <= WHOLE, count * of_row > HELD
        held = None if whole or many else query.new_empty(count, heads, queries, key.shape[2])
        for tile in ctx.tiles:
            probabilities = scores.probabilities(tile, None if held is None else held[tile])
            dropped = scores.dropped(tile, probabilities)
            found[tile] = _product(dropped, value[tile], 1 / (1 - dropout))
        ctx.save_for_backward(*tensors, found, *((probabilities, dropped) if whole else (held, None)))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, found, held, held_dropped = ctx.saved_tensors  # torch.utils.checkpoint gives them once
        query, key, value, *_ = tensors
        scores = _Scores(*ctx.options, *tensors)
        scaling, kept = scores.scaling, 1 / (1 - scores.dropout)
        by_query, by_key, by_value = (torch.empty_like(one) for one in (query, key, value))
        taken_off = (gradient * found).sum(dim=-1, keepdim=True).neg_()
        gradient = gradient.contiguous()
        for tile in ctx.tiles:
            probabilities = scores.probabilities(tile) if held is None else held[tile]
            dropped = scores.dropped(tile, probabilities) if held_dropped is None else held_dropped
            _product(dropped.transpose(2, 3), gradient[tile], kept, by_value[tile])
            by_scores = _product(gradient[tile], value[tile].transpose(2, 3), kept).mul_(dropped)
            by_scores.addcmul_(probabilities, taken_off[tile])
            _product(by_scores, key[tile], scaling, by_query[tile])
            _product(by_scores.transpose(2, 3), query[tile], scaling, by_key[tile])
        return None, None, None, by_query, by_key, by_value, None, None, None


def _tiles(rows: int, of_row: int) -> list[slice]:
    """Rows that are attended to at once, of so many bytes of scores each: all, where those are few."""
    size = rows if rows * of_row <= WHOLE else max(1, TILE // of_row)
    return [slice(start, start + size) for start in range(0, rows, size)]


@dataclass
class _Scores:
    """What becomes of the scores of a tile of rows, (tile, heads, queries, keys)."""

    dropout: float
    scaling: float
    rows: RowKeys
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    row_keys: torch.Tensor
    salt: torch.Tensor

    def probabilities(self, tile: slice, to: torch.Tensor | None = None) -> torch.Tensor:
        """The softmax of the scores, written to `to`."""
        scores = _product(self.query[tile], self.key[tile].transpose(2, 3), self.scaling)
        if self.mask is not None:
            of_rows = self.mask.dim() == 4 and len(self.mask) > 1
            scores = _masked(scores, self.mask[tile] if of_rows else self.mask)
        return torch.softmax(scores, dim=-1, out=to)

    @cached_property
    def _table(self) -> torch.Tensor:
        """The dropout's (heads, queries, keys), as large as the scores of a row."""
        return self.rows.table(self.salt, (*self.query.shape[1:3], self.key.shape[2]))

    def dropped(self, tile: slice, probabilities: torch.Tensor) -> torch.Tensor:
        """The same with zeros where the dropout has drawn."""
        # One or nought times the bits of a float. A mask of bytes, which torch must first make floats of,
        # takes 1.5 times as long.
        kept = (self.row_keys[tile].view(-1, 1, 1, 1) * self._table).ge_(threshold_of(self.dropout))
        return kept.mul_(probabilities.view(torch.int32)).view(torch.float32)


def _product(
    left: torch.Tensor, right: torch.Tensor, factor: float, to: torch.Tensor | None = None
) -> torch.Tensor:
    """`factor` times the matrix product of each head of each row, (rows, heads, m, k) by (rows, heads, k, n),
    written to `to`. The factor costs nothing there; by itself it would be a pass over memory."""
    if to is None:
        to = left.new_empty(*left.shape[:3], right.shape[3])
    to.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=factor)
    return to
