"""The last layer for only the first position: the same logits and gradients, including dropout, or the whole
layer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from ft.config import Config
from ft.invariance import key_dropout
from ft.last_layer import FORWARD, narrow_last_layer
from ft.lora import add_lora
from ft.model import checkpoint_activations


def small(kind, attention=None, **options):
    """A random sequence classifier of two small layers with dropout 0.1."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if kind == "electra":
        sizes["embedding_size"] = 16
    config = AutoConfig.for_model(kind, vocab_size=40, num_labels=3, pad_token_id=0, **sizes, **options)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    for name, weight in model.named_parameters():  # biases begin at zero, which would hide errors
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    return model


def rows(padding):
    """input_ids and attention_mask of 16 rows of 3 to 19 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (16, 1), generator=generator)
    place = torch.arange(20) if padding == "right" else torch.arange(19, -1, -1)
    mask = (place < lengths).long()
    return {
        "input_ids": torch.randint(4, 40, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
    }


def outcome(model, inputs):
    """Logits of a training pass under row-keyed dropout, and the gradients of all trained weights."""
    keys, unkeyed = key_dropout(model, "row_keyed", 42)
    assert unkeyed == []
    model.train()
    keys.set(7, torch.arange(16))
    logits = model(**inputs).logits
    nn.functional.cross_entropy(logits, torch.arange(16) % 3, reduction="sum").backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)  # DDP would wait for unused ones
    return [logits.detach(), torch.cat([weight.grad.flatten() for weight in trained])]


def assert_the_same_in_training(model, padding="right"):
    narrow, seen = copy.deepcopy(model), []
    assert narrow_last_layer(narrow) == []
    for module in narrow.modules():
        if isinstance(module, nn.Linear) and module.out_features == 64:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    inputs = rows(padding)
    for one, other in zip(outcome(model, inputs), outcome(narrow, inputs), strict=True):
        assert (one - other).norm() / one.norm() < 2e-6
    assert set(seen) >= {20, 1}  # the layer below had all positions, the last one had one


@pytest.mark.parametrize("kind", FORWARD)
def test_logits_and_gradients_are_those_of_the_whole_layer_under_the_same_dropout(kind):
    assert_the_same_in_training(small(kind))


def test_so_they_are_with_padding_on_the_left():
    assert_the_same_in_training(small("bert"), padding="left")


@pytest.mark.parametrize("beside", [None, "query", "value"])
def test_so_they_are_under_lora(beside):
    model = small("roberta")
    options = Config(model_name_or_path="-", lora_rank=4, lora_dropout=0.1, lora_target_modules=beside)
    add_lora(model, options, "text-classification", "-", set())
    for name, weight in model.named_parameters():
        if ".lora_B." in name:  # initially zero, with which LoRA changes nothing
            nn.init.normal_(weight)
    assert_the_same_in_training(model)


def test_so_they_are_with_activation_checkpointing():
    model = small("distilbert")
    checkpoint_activations(model)
    assert_the_same_in_training(model)


def test_so_they_are_up_to_the_digits_of_bf16():
    model = small("bert", initializer_range=0.2)
    narrow = copy.deepcopy(model)
    assert narrow_last_layer(narrow) == []
    exact = outcome(copy.deepcopy(model), rows("right"))
    with torch.autocast("cpu", torch.bfloat16):
        found = [outcome(one, rows("right")) for one in (model, narrow)]
    off = [
        [(one - right).norm() / right.norm() for one, right in zip(of, exact, strict=True)] for of in found
    ]
    for whole, first in zip(*off, strict=True):
        assert 1e-4 < first < 1.5 * whole


def test_no_position_has_a_key_or_a_value_but_under_lora_which_needs_them():
    plain, lora = small("bert"), small("bert")
    add_lora(lora, Config(model_name_or_path="-", lora_rank=4), "text-classification", "-", set())
    for model in (plain, lora):
        made = []
        assert narrow_last_layer(model) == []
        attention = model.base_model.encoder.layer[1].attention.self
        for side in (attention.key, attention.value):
            side.register_forward_hook(lambda *_, made=made: made.append(1))
        outcome(model, rows("right"))
        assert bool(made) is (model is lora)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_evaluation_on_transformers_own_attention_is_the_same(attention):
    model, inputs = small("bert", attention).eval(), rows("right")
    whole = model(**inputs).logits
    assert narrow_last_layer(model) == [] and model.config._attn_implementation == attention
    assert torch.allclose(model(**inputs).logits, whole, atol=1e-6)
    assert model.bert(**inputs).last_hidden_state.shape == (16, 1, 32)


class MeanPooler(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.mean(dim=1)


class Stranger(nn.Module):
    """A different kind of layer as the last one."""

    def forward(self, hidden_states, *_, **__):
        return hidden_states


def mean_pooled():
    model = small("bert")
    model.bert.pooler = MeanPooler()
    return model


class PoolerOfGradients(nn.Module):
    """Reads the other positions for nothing but their gradients."""

    def forward(self, hidden_states):
        mean = hidden_states.mean(dim=1)
        return hidden_states[:, 0] + mean - mean.detach()


def mean_pooled_in_gradients():
    model = small("bert")
    model.bert.pooler = PoolerOfGradients()
    return model


def of_another_make():
    model = small("bert")
    model.bert.encoder.layer[1] = Stranger()
    return model


class ReadsMarkers(BertForSequenceClassification):
    """A custom head that also reads the positions of a marker, if a text has any."""

    def forward(self, input_ids, **options):
        hidden = self.bert(input_ids, **options).last_hidden_state
        marked = (input_ids == 39).unsqueeze(-1)
        return SimpleNamespace(logits=self.classifier(hidden[:, 0] + (hidden * marked).sum(1)))


def with_a_head_of_its_own():
    return ReadsMarkers(small("bert").config)


def test_where_it_does_not_fit_the_layer_stays_whole_and_it_is_said():
    for model, draws, why in (
        (with_a_head_of_its_own(), False, "the head of a ReadsMarkers may read others than the first"),
        (mean_pooled(), False, "the head reads others, too"),
        (mean_pooled_in_gradients(), False, "the head reads others, too"),
        (of_another_make(), False, "no attribute 'attention'"),
        (small("deberta-v2"), False, "DebertaV2ForSequenceClassification"),
        (small("bert", is_decoder=True), False, "BertForSequenceClassification"),
        (small("bert"), True, "dropout_mode: torch draws"),
    ):
        inputs = rows("right")
        before, state = model.eval()(**inputs).logits, torch.get_rng_state()
        (note,) = narrow_last_layer(model, draws)
        assert note.startswith("the last layer is computed for every position: ") and why in note
        assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_frozen_and_the_weights_stay_as_they_are():
    model = small("bert")
    model.bert.encoder.layer[1].requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert set(trained.values()) == {True, False}
    assert narrow_last_layer(model.train()) == []
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trained
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
