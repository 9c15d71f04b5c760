"""A model's output for a row depends only on that row, dropout included; or the run says what does not."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from ft import attention, dropout
from ft.dropout import RowKeys, threshold_of
from ft.errors import UserError
from ft.invariance import key_dropout
from ft.model import checkpoint_activations

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {"vocab_size": 40, "pad_token_id": 0, "num_labels": 3}
END = {"bos_token_id": 1, "eos_token_id": 2}
RELATIVE = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DECODER = {**SIZES, "num_key_value_heads": 1, "attention_dropout": 0.1}  # which is 0 by default
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}
KEYED = {
    "bert": SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "roberta": SIZES,  # its head uses one dropout twice
    "electra": {**SIZES, "embedding_size": 16},
    "albert": {  # uses one layer at both depths
        **SIZES, "embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    },
    "mpnet": SIZES,
    "deberta": RELATIVE,  # drops units of a tensor without rows, like the next
    "deberta-v2": {**RELATIVE, "position_buckets": 8, "conv_kernel_size": 3, "conv_act": "gelu"},
    "modernbert": {
        **SIZES, **END, "attention_dropout": 0.1, "embedding_dropout": 0.1, "mlp_dropout": 0.1,
        "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2,
    },
    "gpt2": {**END, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 4},
    "qwen3": {**DECODER, "head_dim": 16},
    "t5": {  # passes a position bias to its attention
        **END, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
        "classifier_dropout": 0.1, "decoder_start_token_id": 0,
    },
}  # fmt: skip
UNKEYED = {
    "bart": (
        {
            **END, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        r"random numbers are drawn, .* model\.encoder\.layers\.\*",
    ),
    "opt": (OPT, r"random numbers are drawn, .* model\.decoder\.layers\.\*$"),
    "opt, layerdrop": (
        {**OPT, "dropout": 0.0, "layerdrop": 0.5},
        r"random numbers are drawn, .* model\.decoder$",
    ),
    "funnel": (
        {"d_model": 32, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64},
        r"attention_structure\.sin_dropout, .* has no row dimension",
    ),
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, "changes with padding"),  # last
    "fnet": (SIZES, "changes with padding"),  # has no attention mask
}  # fmt: skip


def build(kind, options):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **WORDS, **options))
    with torch.no_grad():
        for parameter in model.parameters():  # so that masks matter
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def texts(model, count=24):
    """Rows of 3 to 17 tokens, padded; each ends with the end-of-text token, if the model has one."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 18, (count,), generator=generator)
    mask = (torch.arange(24) < lengths[:, None]).long()
    ids = torch.randint(4, 39, mask.shape, generator=generator) * mask
    end = getattr(model.config, "eos_token_id", None)
    if end is not None:
        ids[torch.arange(count), lengths - 1] = end
    return ids, mask, torch.randperm(1000, generator=generator)[:count]


def gradient(model, keys, parts, padding=0):
    """The gradient of the summed loss over all rows, passed to the model in these parts."""
    ids, mask, rows = texts(model)
    model.zero_grad()
    model.train()
    for part in parts:
        longest = int(mask[part].sum(dim=1).max()) + padding
        keys.set(7, rows[part])
        logits = model(input_ids=ids[part, :longest], attention_mask=mask[part, :longest]).logits
        nn.functional.cross_entropy(logits, torch.as_tensor(part) % 3, reduction="sum").backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def apart(one, other):
    return float(((one - other).norm() / one.norm()).detach())


@pytest.mark.parametrize("kind", KEYED)
def test_gradients_do_not_depend_on_the_cut_the_order_or_the_padding(kind):
    model = build(kind, KEYED[kind])
    keys, notes = key_dropout(model, "row_keyed", 42)
    assert notes == []
    rows = np.arange(24)
    whole = gradient(model, keys, [rows])
    cut = gradient(model, keys, np.array_split(np.random.default_rng(0).permutation(rows), 6))
    padded = gradient(model, keys, [rows], padding=6)
    assert apart(whole, cut) < 5e-5 and apart(whole, padded) < 5e-5  # a random T5 rounds most; others: 1e-6
    keys.seed = 43
    assert apart(whole, gradient(model, keys, [rows])) > 0.02  # the masks matter


WITH_ITS_OWN_BACKWARD = [kind for kind in KEYED if kind not in ("mpnet", "deberta", "deberta-v2", "t5")]


@pytest.mark.parametrize("kind", WITH_ITS_OWN_BACKWARD)
def test_attention_on_a_cpu_has_the_masks_and_the_gradients_of_autograd(kind, monkeypatch):
    """It has its own backward pass. With few scores, all intermediate results are stored for it; with many,
    here for five of 24 rows at a time, the probabilities of all rows, of ten, or of none. Other kinds have
    their own attention, or learn a bias for it."""
    model = build(kind, KEYED[kind])
    keys, _ = key_dropout(model, "row_keyed", 42)
    rows, done, tiles = np.arange(24), [], attention._tiles
    monkeypatch.setattr(attention, "_tiles", lambda *sides: done.append(tiles(*sides)) or done[-1])
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_in_fp32_on_cpu", lambda *tensors: False)
        by_autograd = gradient(model, keys, [rows])
    assert done == []
    whole = gradient(model, keys, [rows])
    assert len(done) >= 2 and len(done[0]) == 1
    assert apart(by_autograd, whole) < 2e-6
    monkeypatch.setattr(attention, "WHOLE", 0)
    of_row = 2 * 17 * 17 * 4
    monkeypatch.setattr(attention, "TILE", 5 * of_row)
    for most_held in (24 * of_row, 10 * of_row, 0):
        monkeypatch.setattr(attention, "HELD", most_held)
        done.clear()
        tiled = gradient(model, keys, [rows])
        assert len(done) >= 2 and len(done[0]) == 5
        assert apart(by_autograd, tiled) < 2e-6
        assert apart(tiled, gradient(model, keys, np.array_split(rows, 6))) < 5e-6


def scores_held(monkeypatch, rows, **patched):
    """The gradient of rows of 17 tokens, and how many numbers derived from a layer's scores are stored."""
    for name, value in patched.items():
        monkeypatch.setattr(attention, name, value)
    model = build("bert", SIZES)
    keys, _ = key_dropout(model, "row_keyed", 42)
    held = []

    def note(tensor):
        if tensor.dim() == 4 and tensor.shape[2:] == (17, 17) and tensor.shape[1] == 2:  # heads
            held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = gradient(model, keys, [np.arange(rows)])
    return found, sum(held) / 2  # layers


def test_of_many_scores_only_the_probabilities_are_held_and_no_more_than_a_bound_of_them(monkeypatch):
    of_row = 2 * 17 * 17
    few, held = scores_held(monkeypatch, 24)
    assert held == 2 * 24 * of_row  # the probabilities, and the same after the dropout
    many, held = scores_held(monkeypatch, 24, WHOLE=0)
    assert held == 24 * of_row
    assert apart(few, many) < 2e-6
    bounded, held = scores_held(monkeypatch, 24, HELD=10 * of_row * 4)
    assert held == 10 * of_row
    assert apart(few, bounded) < 2e-6
    nothing, held = scores_held(monkeypatch, 24, HELD=of_row * 4 - 1)  # as with one very long text
    assert held == 0
    assert apart(few, nothing) < 2e-6


def test_more_rows_never_hold_less(monkeypatch):
    """The preflight tries the largest updates, and halving a batch is the remedy for too little memory. (Up
    to `WHOLE`, a layer stores up to 16 MB more.)"""
    bounds = {"WHOLE": 0, "HELD": 10 * 2 * 17 * 17 * 4}
    held = [scores_held(monkeypatch, rows, **bounds)[1] for rows in (4, 9, 10, 11, 12, 24)]
    assert held == sorted(held) and held[0] < held[-1]


@pytest.mark.parametrize("mask", ["none", "causal", "of all rows", "of each row", "a bias"])
@pytest.mark.parametrize("bounds", [{}, {"WHOLE": 0, "TILE": 1}, {"WHOLE": 0, "TILE": 1, "HELD": 0}])
def test_attention_on_a_cpu_takes_the_masks_and_the_scaling_of_any_model(mask, bounds, monkeypatch):
    """Five queries attend to seven keys: the two are never confused."""
    torch.manual_seed(0)
    sides = [torch.randn(3, 2, size, 16, requires_grad=True) for size in (5, 7, 7)]
    module, keys = nn.Module(), RowKeys(42)
    module.row_keys, module.dropout_place, module.is_causal = keys, keys.place(-1), mask == "causal"
    module.longest = None
    seen = {
        "of all rows": torch.rand(1, 1, 5, 7) > 0.3,
        "of each row": (torch.arange(7) < torch.tensor([[7], [3], [5]])).view(3, 1, 1, 7),
        "a bias": torch.randn(3, 1, 5, 7),
    }.get(mask)

    def attended():
        keys.set(0, torch.arange(3))
        found, _ = attention.attend(module, *sides, seen, dropout=0.1, scaling=0.5)
        return found, *torch.autograd.grad(found.square().sum(), sides)

    for name, value in bounds.items():
        monkeypatch.setattr(attention, name, value)
    own = attended()
    monkeypatch.setattr(attention, "_in_fp32_on_cpu", lambda *tensors: False)
    for one, other in zip(own, attended(), strict=True):
        assert one.shape == other.shape and apart(other, one) < 1e-6


def test_values_may_have_another_size_than_queries_and_keys(monkeypatch):
    sides = [torch.randn(3, 2, 7, size, requires_grad=True) for size in (16, 16, 8)]
    module, keys = nn.Module(), RowKeys(42)
    module.row_keys, module.dropout_place, module.is_causal = keys, keys.place(-1), False
    module.longest = None

    def attended():
        keys.set(0, torch.arange(3))
        found, _ = attention.attend(module, *sides, None, dropout=0.1)
        return found, *torch.autograd.grad(found.square().sum(), sides)

    own = attended()
    monkeypatch.setattr(attention, "_in_fp32_on_cpu", lambda *tensors: False)
    for one, other in zip(own, attended(), strict=True):
        assert one.shape == other.shape and apart(other, one) < 1e-6


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "qwen3"])
def test_in_bf16_on_a_cpu_attention_is_left_to_autograd(kind, monkeypatch):
    """The queries and keys of Llama and Qwen are fp32 under autocast, their values are not."""
    model = build(kind, KEYED[kind])
    keys, _ = key_dropout(model, "row_keyed", 42)
    exact = gradient(model, keys, [np.arange(24)])
    monkeypatch.setattr(attention, "_tiles", lambda *sides: pytest.fail("not in fp32"))
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(exact, gradient(model, keys, [np.arange(24)])) < 0.02


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("kind", KEYED)
def test_where_nothing_is_dropped_training_gives_transformers_own_logits(kind, on_cpu, monkeypatch):
    """The attention function handles everything: masks, causality, windows, position biases."""
    model = build(kind, KEYED[kind])
    ids, mask, rows = texts(model)
    own = model.eval()(input_ids=ids, attention_mask=mask).logits
    keys, _ = key_dropout(model, "row_keyed", 42)

    def nothing_dropped(scores, tile, probabilities):
        return probabilities * (1 - scores.dropout)  # the values are divided by it

    monkeypatch.setattr(dropout, "drop", lambda x, *rest: x)
    monkeypatch.setattr(attention, "drop_and_scale", lambda x, y, *rest: (x, y))
    monkeypatch.setattr(attention._Scores, "dropped", nothing_dropped)
    if not on_cpu:
        monkeypatch.setattr(attention, "_in_fp32_on_cpu", lambda *tensors: False)
    keys.set(0, rows)
    assert apart(own, model.train()(input_ids=ids, attention_mask=mask).logits) < 1e-5


@pytest.mark.parametrize("kind", KEYED)
def test_no_two_dropouts_of_a_pass_have_the_same_mask(kind):
    """ALBERT uses one layer at every depth, RoBERTa's head one dropout twice."""
    model = build(kind, KEYED[kind])
    keys, _ = key_dropout(model, "row_keyed", 42)
    tables, original = [], keys.table
    keys.table = lambda *args: tables.append(original(*args)) or tables[-1]
    gradient(model, keys, [np.arange(24)])
    assert len(tables) >= 2
    corners = [(keys.keys[0] * table >= threshold_of(0.1)).flatten()[:500] for table in tables]
    for number, corner in enumerate(corners):
        for other in corners[:number]:
            size = min(len(corner), len(other))
            assert not torch.equal(corner[:size], other[:size])


@pytest.mark.parametrize("kind", UNKEYED)
def test_what_depends_on_more_than_the_row_is_named_in_one_line(kind):
    options, message = UNKEYED[kind]
    model = build(kind.partition(",")[0], options)
    torch.manual_seed(3)
    keys, notes = key_dropout(model, "row_keyed", 42)
    assert len(notes) == 1
    assert re.search(message, notes[0]), notes
    rows = np.arange(24)
    cut = gradient(model, keys, np.array_split(rows, 6))
    assert apart(gradient(model, keys, [rows]), cut) > 1e-3  # the gradients were right before


@pytest.mark.parametrize("kind", ["albert", "llama", "modernbert"])
def test_attention_without_dropout_is_not_said_to_draw(kind):
    options = {key: value for key, value in KEYED[kind].items() if "dropout" not in key}
    assert key_dropout(build(kind, options), "row_keyed", 42)[1] == []


def test_activations_that_are_computed_again_get_their_masks_again():
    gradients = []
    for again in (False, True):
        model = build("roberta", SIZES)
        # The same layer at two depths, as in ALBERT, which cannot recompute activations.
        model.roberta.encoder.layer[1] = model.roberta.encoder.layer[0]
        if again:
            checkpoint_activations(model)
        keys, _ = key_dropout(model, "row_keyed", 42)
        gradients.append(gradient(model, keys, [np.arange(24)]))
    assert torch.equal(*gradients)


def test_a_model_that_cannot_compute_activations_again_is_refused():
    with pytest.raises(
        UserError, match="gradient_checkpointing: a AlbertForSequenceClassification has no way"
    ):
        checkpoint_activations(build("albert", KEYED["albert"]))


def test_a_second_model_of_one_config_is_keyed_too():
    from transformers import AutoModelForSequenceClassification

    first = build("bert", SIZES)
    key_dropout(first, "row_keyed", 42)
    second = AutoModelForSequenceClassification.from_config(first.config)
    assert key_dropout(second, "row_keyed", 42)[1] == []


def test_a_model_that_cannot_be_tried_is_said_to_be_so():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, pixels):
            return self.layer(pixels)

    _, notes = key_dropout(Picky(), "row_keyed", 0)
    assert len(notes) == 1 and "could not be tried on short rows" in notes[0] and "input_ids" in notes[0]
