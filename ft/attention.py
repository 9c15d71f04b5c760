"""Attention with row-keyed dropout on its probabilities, as one of Transformers' attention functions.

On a CPU, the backward pass is one of its own, and many long texts are attended to a few rows at a time, as in
FlashAttention (Dao et al., 2022): the scores, which grow with the square of the length, are then never held
for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ft.dropout import RowKeys, drop_and_scale, threshold_of

ATTENTION_NAME = "row_keyed"  # in Transformers' registry of attention functions
HELD = 2**27  # bytes of a layer's scores that are held whole: tiles would save little, and cost some time
TILE = 2**24  # bytes of scores at a time, where there are more


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
    # Passes over the scores are what this costs: they are scaled as the queries, and masked in place (1.03 to
    # 1.09 times as fast at 256 tokens).
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
    place: Any = module.dropout_place
    learned = position_bias is not None or (attention_mask is not None and attention_mask.requires_grad)
    if _in_fp32_on_cpu(query, key, value) and not learned and rows.come_first(place, shape[0]):
        salt = rows.salt(place, rows.next_use(place, shape))
        value = value * (1 / (1 - dropout))
        found = _OnCpu.apply(dropout, rows, query, key, value, attention_mask, rows.keys, salt)
        return found.transpose(1, 2), None
    scores = torch.matmul(query, key.transpose(2, 3))
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
    """Attention in fp32: scaled queries, keys and values (rows, heads, tokens, size), a mask, the keys of the
    rows and the salt of the table that make the dropout's (`RowKeys`), to (rows, heads, queries, value size).

    Where the scores of a layer are many, it takes a few rows at a time, and computes their probabilities
    again in the backward pass: with 32 rows of 512 tokens, a third of the memory and 1.05 to 1.2 times the
    speed.

    The backward pass does without that of the softmax, and without the dropout's mask: what softmax takes off
    each row of the scores' gradients is the sum of gradient times output (FlashAttention, algorithm 4). That,
    and masking in whole numbers (`_drawn`), make attention 1.1 to 1.17 times as fast at 24 to 480 tokens, an
    update 0.99 times at 24, 1.02 at 80 and 1.14 at 440."""

    @staticmethod
    def forward(ctx: Any, dropout: float, rows: RowKeys, *tensors: Any) -> torch.Tensor:
        query, key, value, *_ = tensors
        count, heads, queries, _ = query.shape
        of_row = 4 * heads * queries * key.shape[2]  # bytes of scores
        ctx.dropout, ctx.rows, ctx.tiles = dropout, rows, _tiles(count, of_row)
        # In memory as the layer goes on with it.
        found = query.new_empty(count, queries, heads, value.shape[3]).transpose(1, 2)
        drawn: tuple[torch.Tensor, ...] = ()
        for tile, drawn in _drawn(ctx.tiles, dropout, rows, *tensors):
            found[tile] = torch.matmul(drawn[1], value[tile])
        ctx.save_for_backward(*tensors, found, *(drawn if count * of_row <= HELD else ()))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: torch.utils.checkpoint gives them once
        tensors, found, held = saved[:6], saved[6], saved[7:]
        query, key, value, *_ = tensors
        by_query, by_key, by_value = (torch.empty_like(one) for one in (query, key, value))
        taken_off = (gradient * found).sum(dim=-1, keepdim=True).neg_()
        again = [(ctx.tiles[0], held)] if held else _drawn(ctx.tiles, ctx.dropout, ctx.rows, *tensors)
        for tile, (probabilities, dropped) in again:
            by_value[tile] = torch.matmul(dropped.transpose(2, 3), gradient[tile])
            by_scores = torch.matmul(gradient[tile], value[tile].transpose(2, 3)).mul_(dropped)
            by_scores.addcmul_(probabilities, taken_off[tile])
            by_query[tile] = torch.matmul(by_scores, key[tile])
            by_key[tile] = torch.matmul(by_scores.transpose(2, 3), query[tile])
        return None, None, by_query, by_key, by_value, None, None, None


def _tiles(rows: int, of_row: int) -> list[slice]:
    """Rows that are attended to at once, of so many bytes of scores each: all, where those are few."""
    size = rows if rows * of_row <= HELD else max(1, TILE // of_row)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _drawn(
    tiles: list[slice], dropout: float, rows: RowKeys, query: torch.Tensor, key: torch.Tensor,
    _value: torch.Tensor, mask: torch.Tensor | None, row_keys: torch.Tensor, salt: torch.Tensor,
) -> Iterator[tuple[slice, tuple[torch.Tensor, torch.Tensor]]]:  # fmt: skip
    """Of one tile after another, the probabilities, and the same with zeros where the dropout has drawn."""
    table = rows.table(salt, (*query.shape[1:3], key.shape[2]))  # as large as the scores of a row
    for tile in tiles:
        scores = torch.matmul(query[tile], key[tile].transpose(2, 3))
        if mask is not None:
            scores = _masked(scores, mask[tile] if mask.dim() == 4 and len(mask) > 1 else mask)
        probabilities = torch.softmax(scores, dim=-1)
        # One or nought times the bits of a float. A mask of bytes, which torch must first make floats of,
        # takes 1.5 times as long.
        kept = (row_keys[tile].view(-1, 1, 1, 1) * table).ge_(threshold_of(dropout))
        yield tile, (probabilities, kept.mul_(probabilities.view(torch.int32)).view(torch.float32))
