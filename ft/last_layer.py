"""Computes the last layer of an encoder only for the first position, if the head reads no other.

A classification head of BERT, RoBERTa, ELECTRA or DistilBERT reads the first position of the last layer,
which needs query, attention output and feed-forward network only for that position, and no keys and values at
all (`_attend_to_inputs`). The weights, their names and the outputs stay the same, and so do the dropout
masks: a row-keyed mask of the first position is a corner of that of all.

Measured (BERT of width 384, 32 rows of 77 tokens, one CPU thread, in turn with the whole layer), with keys
and values of all positions: updates are 1.15 times as fast on 6 layers and 1.08 on 12, evaluation 1.17 and
1.07; 24 tokens, 6 layers: 1.12 and 1.16. Without them (two threads, 6 layers, in turn with the former): 1.03
at 24, 80 and 256 tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ft.attention import masked
from ft.dropout import drop
from ft.errors import first_line

TOLERANCE = 1e-5  # relative, of logits and of gradients in fp32; less than 1e-6 is usual
ATTENTIONS = ("eager", "row_keyed", "sdpa")  # those that take fewer queries than keys as they are
EVERY = "the last layer is computed for every position"


def narrow_last_layer(model: nn.Module, draws: bool = False) -> list[str]:
    """Have the last layer compute only its first position, if the architecture and its head are Transformers'
    own and known, and logits and gradients stay the same on three short rows; otherwise returns a note for
    the user. `draws`: whether dropout draws from torch's generator, whose stream would change.

    For a model in fp32 on the CPU, before it is wrapped. Draws nothing from the global generators itself."""
    config: Any = getattr(model, "config", None)
    kind, attention = getattr(config, "model_type", ""), getattr(config, "_attn_implementation", None)
    # The class counts, too: a head with custom code may read other positions only in some rows, such as
    # those of a marker, which no probe would hit.
    known = kind in FORWARD and type(model).__module__.startswith("transformers.models.")
    if not known or getattr(config, "is_decoder", False):
        return [f"{EVERY}: the head of a {type(model).__name__} may read others than the first"]
    if draws:
        return [f"{EVERY}: dropout_mode: torch draws the numbers that Transformers' own layer draws"]
    if attention not in ATTENTIONS:
        return [f"{EVERY}: {attention} attention is not tried for one"]
    layer = None
    try:
        layer = _layers(model)[-1]
        whole = type(layer)
        logits, gradients = _probe(model, layer)
        # A class of the same name: what selects layers by class (FSDP, activation checkpointing) finds it.
        layer.__class__ = type(whole.__name__, (whole,), {"forward": FORWARD[kind]})
        narrow_logits, narrow_gradients = _probe(model, layer)
        if _same([logits], [narrow_logits]) and _same(gradients, narrow_gradients):
            return []
        why = "the head reads others, too"
    except Exception as error:  # of the model's own code, which may differ from what its name says
        why = first_line(error)
    if layer is not None:
        layer.__class__ = whole
    return [f"{EVERY}: {why}"]


def _layers(model: Any) -> nn.ModuleList:
    base = model.base_model
    return (base.transformer if hasattr(base, "transformer") else base.encoder).layer


def _bert_layer(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any,
    **options: Any,
) -> torch.Tensor:  # fmt: skip
    """`BertLayer.forward` and its copies: (rows, tokens, size) to (rows, 1, size)."""
    first, attention = hidden_states[:, :1], self.attention.self
    projections = attention.query, attention.key, attention.value
    found = _attend(attention, projections, hidden_states, attention_mask, options)
    return self.feed_forward_chunk(self.attention.output(found, first))


def _distilbert_layer(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """DistilBERT's `TransformerBlock.forward`: (rows, tokens, size) to (rows, 1, size)."""
    first, attention = hidden_states[:, :1], self.attention
    projections = attention.q_lin, attention.k_lin, attention.v_lin
    found = attention.out_lin(_attend(attention, projections, hidden_states, attention_mask, options))
    found = self.sa_layer_norm(found + first)
    return self.output_layer_norm(self.ffn(found) + found)


FORWARD: dict[str, Callable] = {
    **dict.fromkeys("bert camembert data2vec-text electra ernie roberta xlm-roberta".split(), _bert_layer),
    "distilbert": _distilbert_layer,
}


def _attend(
    attention: Any, projections: tuple[Any, ...], hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None, options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """The attention of the first position to all of (rows, tokens, size): (rows, 1, size)."""
    query, key, value = projections
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    if all(type(side) is nn.Linear and side.bias is not None for side in (key, value)):  # LoRA's are not
        # A slice, not an index: without that dimension, LoRA's dropout would differ.
        of_first = query(hidden_states[:, :1]).squeeze(1)
        return _attend_to_inputs(attention, of_first, key, value, hidden_states, mask)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sides = query(hidden_states[:, :1]), key(hidden_states), value(hidden_states)
    heads = (side.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2) for side in sides)
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    found, _ = function(
        attention, *heads, mask,
        dropout=attention.dropout.p if attention.training else 0.0, scaling=attention.scaling, **options,
    )  # fmt: skip
    return found.flatten(2)


def _attend_to_inputs(
    attention: Any, query: torch.Tensor, key: nn.Linear, value: nn.Linear, hidden_states: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The same for a query of each row (rows, size), without keys and values of the positions.

    q (W x + b) is (q W) x + q b, and a mean of W x + b is W times the mean of x, plus b: the weights of keys
    and values are applied once per row, not once per token. (DeepSeek-V2, 2024, does so in decoding.)"""
    heads = (-1, attention.attention_head_size)
    key_weight, value_weight = (side.weight.unflatten(0, heads) for side in (key, value))
    key_bias, value_bias = (side.bias.unflatten(0, heads) for side in (key, value))
    query = query.unflatten(-1, heads) * attention.scaling
    by_input = torch.einsum("rhd,hds->rhs", query, key_weight)
    # The softmax is invariant to the bias, which is here to get a gradient, as in the whole layer.
    scores = by_input @ hidden_states.transpose(1, 2) + (query * key_bias).sum(-1, keepdim=True)
    scores = scores.unsqueeze(2)  # (rows, heads, 1, tokens)
    if mask is not None:
        scores = masked(scores, mask)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if attention.training and attention.dropout.p:
        probabilities = drop(probabilities, attention.row_keys, attention.dropout.p, attention.dropout_place)
    probabilities = probabilities.squeeze(2)
    mean = probabilities @ hidden_states  # (rows, heads, size)
    found = torch.einsum("rhs,hds->rhd", mean, value_weight)
    found = found + probabilities.sum(-1, keepdim=True) * value_bias  # which is not 1 under dropout
    return found.flatten(1).unsqueeze(1)


def _probe(model: Any, layer: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Logits of three rows, padded on the right, on the left and not at all, and the gradients of the layer's
    input, at every position, and of its weights; without dropout."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[torch.Tensor] = []

    def cut(_module: nn.Module, args: tuple) -> tuple:
        inputs.append(args[0].detach().requires_grad_())  # no gradient for what is below
        return (inputs[-1], *args[1:])

    place = torch.arange(7)
    mask = torch.stack([place < 4, place >= 2, place >= 0])
    ids = torch.randint(model.config.vocab_size, mask.shape, generator=generator)
    ids = torch.where(mask, ids, model.config.pad_token_id or 0)
    was_training, handle = model.training, layer.register_forward_pre_hook(cut)
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
            loss = (logits * torch.randn(logits.shape, generator=generator)).sum()
            of = [*inputs, *(weight for weight in layer.parameters() if weight.requires_grad)]
            return logits.detach(), list(torch.autograd.grad(loss, of, allow_unused=True))
    finally:
        handle.remove()
        model.train(was_training)


def _same(some: list[torch.Tensor | None], others: list[torch.Tensor | None]) -> bool:
    """Whether all tensors together are the same up to rounding. (One alone may be nothing but rounding: the
    gradient of the keys' bias.)"""
    if [None if one is None else one.shape for one in some] != [
        None if other is None else other.shape for other in others
    ]:
        return False  # a weight that is no longer used would stop DDP
    whole, other = (torch.cat([one.flatten() for one in side if one is not None]) for side in (some, others))
    return float((whole - other).norm()) <= TOLERANCE * float(whole.norm())
