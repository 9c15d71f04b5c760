"""The parts of a model: which parameters are frozen, and which learning rate each group has."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from ft.config import Config
from ft.errors import UserError
from ft.layers import compile_layers, depths, freeze, head_names
from ft.optim import build_optimizer, build_scheduler, parameter_groups

SMALL = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip


def build(kind="bert", **changes):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **SMALL | changes))


def rates(model, **options):
    config = Config(model_name_or_path="m", train_file="f", learning_rate=1.0, **options)
    groups = parameter_groups(model, config)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: rate[id(p)] for name, p in model.named_parameters() if id(p) in rate}, groups


def test_each_layer_has_the_rate_of_the_one_above_times_the_decay():
    found, groups = rates(build(), layerwise_lr_decay=0.5)
    expected = {
        "bert.embeddings.": 0.125, "bert.encoder.layer.0.": 0.25, "bert.encoder.layer.1.": 0.5,
        "bert.encoder.layer.2.": 1.0, "bert.pooler.": 1.0, "classifier.": 1.0,
    }  # fmt: skip
    for name, rate in found.items():
        assert rate == next(value for stem, value in expected.items() if name.startswith(stem)), name
    assert [group["lr"] for group in groups] == [1, 1, 0.125, 0.125, 0.25, 0.25, 0.5, 0.5]
    names = ["head_and_layer_2", "embeddings", "layer_0", "layer_1"]
    assert [group["name"] for group in groups] == [name for name in names for _ in range(2)]
    _, groups = rates(build(), layerwise_lr_decay=0.5, head_learning_rate=9.0)
    assert [group["name"] for group in groups[::2]] == ["layer_2", "embeddings", "layer_0", "layer_1", "head"]


def test_the_head_has_a_rate_of_its_own_and_vectors_are_not_decayed():
    found, groups = rates(build(), head_learning_rate=10.0, weight_decay=0.1)
    assert {name for name, rate in found.items() if rate == 10} == {"classifier.weight", "classifier.bias"}
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1, 0.1),
        (1, 0),
        (10, 0.1),
        (10, 0),
    ]
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])
    assert [group["name"] for group in groups] == ["pretrained", "pretrained", "head", "head"]


def test_without_recipes_there_are_two_groups_in_the_order_of_the_model():
    model = build()
    _, groups = rates(model)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    for group, expected in zip(groups, (matrices, vectors), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]


def test_the_schedule_keeps_the_ratio_and_the_base_rate_is_the_first_even_where_nothing_has_it():
    model = build().to_empty(device="cpu")
    freeze(model, ["bert"])
    config = Config(
        model_name_or_path="m", train_file="f", learning_rate=0.5, head_learning_rate=2.0, warmup_steps=4
    )
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 10)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)  # without a gradient, there is no update
    for step in range(9):
        optimizer.step()
        first, *others = map(float, scheduler.get_last_lr())
        assert first == pytest.approx(0.5 * (step / 4 if step < 4 else (10 - step) / 6))
        assert others and others == pytest.approx([4 * first] * len(others))
        scheduler.step()


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra", "deberta-v2", "mpnet"])
def test_layers_and_head_are_found_in_other_architectures(kind):
    changes = {"relative_attention": True, "pos_att_type": ["c2p"]} if kind == "deberta-v2" else {}
    model = build(kind, **{**changes, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16})
    below = depths(model)
    assert set(below.values()) == {0, 1, 2, 3}
    for name, depth in below.items():
        if "word_embeddings" in name or "rel_embeddings.weight" in name or "relative_attention" in name:
            assert depth == 3, name
        if name in head_names(model):
            assert depth == 0 and "embeddings" not in name
        if ".layer.0." in name:
            assert depth == 2


def test_a_pooler_has_the_rate_of_the_top_layer_wherever_its_model_makes_it():
    found = depths(build("nomic_bert"))
    assert {depth for name, depth in found.items() if ".pooler." in name} == {0}
    assert {depth for name, depth in found.items() if "embeddings" in name} == {3}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("albert", {"embedding_size": 8}, "no list of its layers"),
        (
            "bart",
            {
                "d_model": 8,
                "encoder_layers": 3,
                "decoder_layers": 3,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
            },
            r"model.encoder.layers, model.dec",
        ),
        (
            "bart",  # only its decoder has as many layers as its config says for both
            {
                "d_model": 8,
                "encoder_layers": 3,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
            },
            r"model.encoder.layers, \.\.\.",
        ),
    ],
)
def test_layers_that_cannot_be_told_are_an_error(kind, changes, said):
    with pytest.raises(UserError, match=f"layerwise_lr_decay: a .*{said}"):
        depths(build(kind, **changes))


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("embeddings", "bert.embeddings."),
        ("encoder.layer.1", "bert.encoder.layer.1."),  # but not layer 10
        ("encoder.layer.1*", ("bert.encoder.layer.1.", "bert.encoder.layer.10.", "bert.encoder.layer.11.")),
        ("encoder.layer.[0-1].*", ("bert.encoder.layer.0.", "bert.encoder.layer.1.")),
        ("bert.*", "bert."),
    ],
)
def test_a_pattern_stands_for_whole_parts_of_a_name(pattern, frozen):
    model = build(num_hidden_layers=12)
    freeze(model, [pattern])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(frozen)
    }


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["embedings"], "'embedings' matches no parameter of the BertFor.*did you mean embeddings"),
        (["embeddings", "xyz"], "'xyz' matches no parameter.*it has bert.embeddings, bert.encoder, .*class"),
        (["bert", "classifier"], "nothing is left to train"),
    ],
)
def test_a_pattern_that_makes_no_sense_is_an_error(patterns, said):
    with pytest.raises(UserError, match=f"freeze: .*{said}"):
        freeze(build(), patterns)


@pytest.mark.parametrize(
    ("patterns", "options"),
    [
        (["classifier"], {"head_learning_rate": 2.0}),
        (["embeddings", "encoder.layer.[01]"], {"layerwise_lr_decay": 0.9}),
    ],
)
def test_a_rate_for_what_is_frozen_is_an_error(patterns, options):
    model = build()
    freeze(model, patterns)
    with pytest.raises(UserError, match=f"{next(iter(options))}: freeze leaves no"):
        rates(model, **options)


@pytest.mark.parametrize(
    ("kind", "changes", "regions"),
    [
        ("bert", {}, [f"bert.encoder.layer.{n}" for n in range(3)]),
        # Each contains lists of its own.
        (
            "t5", {"num_decoder_layers": 3},
            [f"{side}.block.{n}" for side in ("encoder", "decoder") for n in range(3)],
        ),
        ("albert", {"embedding_size": 8}, [""]),  # one layer, used repeatedly
    ],
)  # fmt: skip
def test_the_layers_are_compiled_and_where_none_is_repeated_the_model(monkeypatch, kind, changes, regions):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    model = build(kind, **changes)
    with torch._dynamo.config.patch(optimize_ddp=True):
        compile_layers(model)
        cuts = torch._dynamo.config.optimize_ddp  # only the program of a whole model
    names = {module: name for name, module in model.named_modules()}
    assert [names[module].removeprefix("transformer.") for module in compiled] == regions
    assert cuts == (regions == [""])
