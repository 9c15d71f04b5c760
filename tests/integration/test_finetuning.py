"""Layer-wise rates, the head's own rate, freezing, weight averaging, LoRA: the same on any launch, resumable,
and exported for users who need not know about them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from compare import assert_same, results_in, same_bits, without_timing
from conftest import FORKS, flags, launch, score_here, series, train_here
from safetensors.torch import load_file

from ft.errors import UserError

RECIPES = {
    "weights": {
        "learning_rate": 5e-3, "layerwise_lr_decay": 0.7, "head_learning_rate": 1e-2, "freeze": "embeddings",
        "ema_decay": 0.9,
    },
    "lora": {"lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 2e-2, "ema_decay": 0.9},
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_model, reviews):
    return {
        "model_name_or_path": tiny_model, "dataset_name": reviews, "logging_steps": 1,
        "num_train_epochs": 9, "max_train_steps": 24, "warmup_ratio": 0.1, "weight_decay": 0.01,
        "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 5,
        "save_total_limit": 50,
    }  # fmt: skip


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def whole(config, recipe, tmp_path_factory):
    """One process, the whole update as one batch, without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(**config | recipe, output_dir=output) == 0
    losses = series(output, "train/loss").values()
    assert max(losses) - min(losses) > 0.02  # it changes: the comparisons are meaningful
    return output


def test_accumulation_gives_the_same(config, recipe, whole, tmp_path):
    words = config | recipe | {"per_device_train_batch_size": 5}
    assert train_here(**words, output_dir=tmp_path / "run") == 0
    assert_same(whole, tmp_path / "run")


def test_two_processes_give_the_same(config, recipe, whole, tmp_path):
    words = flags(**config | recipe, per_device_train_batch_size=8, output_dir=tmp_path / "run")
    done = launch(FORKS, words)
    assert done.returncode == 0, done.stderr
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("step", [4, 12])
def test_a_resumed_run_ends_bit_identical(config, recipe, whole, tmp_path, step):
    place = shutil.copytree(whole, tmp_path / "cut")  # as a crash before the next checkpoint leaves it
    for folder in (place / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(place / "final")
    (place / "results.json").unlink()
    assert train_here(**config | recipe, output_dir=place, resume_from_checkpoint="latest") == 0
    for name in ("best", "final"):
        assert same_bits(whole / name, place / name)
    assert without_timing(whole) == without_timing(place)
    assert results_in(whole) == results_in(place)


def test_a_stop_while_best_is_scored_saves_the_last_update_and_not_best(
    config, recipe, whole, tmp_path, monkeypatch
):
    from ft import finish, run

    words = config | recipe | {"save_strategy": "no", "output_dir": tmp_path / "run"}
    best = json.loads((whole / "results.json").read_text())["best/step"]
    assert best < 24, "best/ has to be loaded for the test rows"
    last_score, after_batch = finish._last_score, run.Run._after_batch

    def stop(self, bar, count):
        raise run.StopAsked

    def score_until_stopped(*arguments):
        monkeypatch.setattr(run.Run, "_after_batch", stop)
        return last_score(*arguments)

    monkeypatch.setattr(finish, "_last_score", score_until_stopped)
    assert train_here(**words) == 75
    monkeypatch.setattr(finish, "_last_score", last_score)
    monkeypatch.setattr(run.Run, "_after_batch", after_batch)
    saved, expected = (
        load_file(place / "checkpoints/step-00000024/model.safetensors")
        for place in (tmp_path / "run", whole)
    )
    assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    results = [json.loads((f / "results.json").read_text()) for f in (whole, tmp_path / "run")]
    assert results[0]["test/loss"] == results[1]["test/loss"]


@pytest.mark.parametrize("recipe", ["weights"], indirect=True)
def test_what_is_frozen_keeps_its_bits_and_what_is_exported_is_the_average(
    config, recipe, whole, tmp_path, capsys
):
    before = load_file(config["model_name_or_path"] / "model.safetensors")
    after = load_file(whole / "final/model.safetensors")
    trained = load_file(whole / "checkpoints/step-00000024/model.safetensors")
    state = torch.load(whole / "checkpoints/step-00000024/optimizer.pt", weights_only=True)["optimizer"]
    averages = [entry["average"] for entry in state["state"].values()]
    for name, value in before.items():
        same = torch.equal(value, after[f"bert.{name}"])
        assert same == name.startswith("embeddings."), name
    moved = [name for name in after if not name.startswith("bert.embeddings.")]
    assert len(moved) == len(averages)
    for name in moved:
        assert any(torch.equal(after[name], average) for average in averages), name
        assert not torch.equal(after[name], trained[name]), name
    assert train_here(**config | recipe | {"max_train_steps": 1}, output_dir=tmp_path / "again") == 0
    counts = [sum(v.numel() for k, v in after.items() if k in part) for part in (moved, after)]
    assert f"trainable parameters: {counts[0]:,} of {counts[1]:,}" in capsys.readouterr().out
    assert json.loads((whole / "results.json").read_text())["train/trainable_parameters"] == counts[0]
    assert next(iter(series(whole, "train/learning_rate").values())) < 5e-3  # of the base, not of the head


# --- what LoRA exports


TEXTS = ["great lovely film", "the phone was broken and awful", "it was okay"]
WITHOUT_PEFT = """
import json, sys
sys.modules["peft"] = None
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1], top_k=None, function_to_apply="none")
found = [{one["label"]: one["score"] for one in scores} for scores in classify(json.loads(sys.argv[2]))]
print(json.dumps(found))
"""


@pytest.mark.parametrize("recipe", ["lora"], indirect=True)
def test_best_is_merged_and_its_adapter_gives_the_same_with_peft(config, whole):
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    best = whole / "best"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT, str(best), json.dumps(TEXTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    merged = [[scores[name] for name in ("bad", "fine", "good")] for scores in json.loads(done.stdout)]

    base = AutoModelForSequenceClassification.from_pretrained(config["model_name_or_path"], num_labels=3)
    inputs = AutoTokenizer.from_pretrained(best)(TEXTS, padding=True, return_tensors="pt")
    model = peft.PeftModel.from_pretrained(base, best / "adapter").eval()
    with torch.no_grad():
        unmerged = model(**inputs).logits
        assert (unmerged - torch.tensor(merged)).abs().max() < 1e-5
        with model.disable_adapter():  # LoRA has learned something
            assert (model(**inputs).logits - unmerged).abs().max() > 1e-2
    assert {
        key for key in load_file(best / "model.safetensors") if "lora" in key or "base_layer" in key
    } == set()
    written = json.loads((best / "adapter/adapter_config.json").read_text())
    assert (
        written["r"] == 4 and written["lora_alpha"] == 8 and written["target_modules"] == ["query", "value"]
    )


@pytest.mark.parametrize("recipe", ["lora"], indirect=True)
def test_eval_py_scores_a_merged_model_as_training_did_and_needs_no_peft(
    config, whole, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    words = {"config": whole / "config.yaml", "model_name_or_path": whole / "best"}
    assert score_here(**words, output_dir=tmp_path / "scored") == 0
    trained, scored = (json.loads((f / "results.json").read_text()) for f in (whole, tmp_path / "scored"))
    assert scored["test/loss"] == pytest.approx(trained["test/loss"], rel=1e-5)
    assert scored["test/accuracy"] == trained["test/accuracy"]


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "bert", "gpt2"])
def test_lora_beside_every_linear_module_leaves_the_head_whole(kind, tmp_path):
    """Heads of two layers, whose names end like those of the layers below; a new pooler is trained, too;
    GPT-2 has transposed weights."""
    import peft
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from ft.config import Config
    from ft.lora import add_lora, load_adapter, merge, save_adapter

    small = {
        "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "n_heads": 2,
        "intermediate_size": 16, "dim": 8, "hidden_dim": 16, "n_layers": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    shape = AutoConfig.for_model(kind, **small)
    model = AutoModelForSequenceClassification.from_config(shape)
    model.save_pretrained(tmp_path / "base")
    new = {name for name, _ in model.named_parameters() if "pooler" in name}
    options = Config(lora_rank=2, lora_target_modules="all-linear", lora_dropout=0.1)
    add_lora(model, options, "text-classification", str(tmp_path / "base"), new)
    model.eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = new | {name for name, _ in model.named_parameters() if re.search(r"classifier|^score", name)}
    assert trained == head | {name for name, _ in model.named_parameters() if "lora_" in name}
    assert not any("lora_" in name or "base_layer" in name for name in head)
    with torch.no_grad():
        for name in sorted(trained):  # a set's order, and so the numbers, would differ in every process
            model.get_parameter(name).normal_(std=0.3)
    ids = torch.arange(12).reshape(2, 6) + 3
    expected = model(input_ids=ids).logits
    (tmp_path / "best").mkdir()
    save_adapter(model, model.state_dict(), tmp_path / "best/adapter")

    plain = AutoModelForSequenceClassification.from_config(shape).eval()
    plain.load_state_dict(merge(model, model.state_dict()))
    assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-4)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "best/adapter").eval()
    assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-5)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).zero_()
    model.load_state_dict(load_adapter(model, tmp_path / "best/adapter"), strict=False)
    assert torch.equal(model(input_ids=ids).logits, expected)


# --- what makes no sense


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layerwise_lr_decay": 0}, "layerwise_lr_decay: found 0, expected a number above 0 and up to 1"),
        ({"layerwise_lr_decay": 1.1}, "layerwise_lr_decay: found 1.1"),
        ({"head_learning_rate": 0}, "head_learning_rate: found 0.*above 0"),
        ({"ema_decay": 1}, "ema_decay: found 1, expected a number between 0 and 1"),
        ({"freeze": "bert.embedding"}, "freeze: 'bert.embedding' matches no.*did you mean bert.embeddings"),
        ({"freeze": "*"}, "nothing is left to train"),
        ({"freeze": "classifier", "head_learning_rate": 1e-3}, "head_learning_rate: freeze leaves no param"),
        ({"freeze": "bert", "layerwise_lr_decay": 0.9}, "layerwise_lr_decay: freeze leaves no layer"),
        ({"freeze": "embeddings", "lora_rank": 4}, "freeze: found embeddings, but lora_rank is set"),
        ({"lora_rank": 0}, "lora_rank: found 0.*above 0"),
        ({"lora_alpha": 8}, "lora_alpha: is for LoRA, but lora_rank is not set"),
        (
            {"torch_compile": True, "gradient_checkpointing": True},
            "torch_compile: with gradient_checkpointing",
        ),
        (
            {"threshold_mode": "global", "eval_strategy": "no"},
            "threshold_mode: found global, but eval_strategy is no",
        ),
        (
            {"early_stopping_patience": 1, "eval_strategy": "no"},
            "early_stopping_patience: found 1, but eval_strategy is no",
        ),
        ({"lora_dropout": 0.1}, "lora_dropout: is for LoRA"),
        ({"lora_dropout": 1, "lora_rank": 4}, "lora_dropout: found 1.*below 1"),
        ({"lora_target_modules": "query"}, "lora_target_modules: is for LoRA"),
        (
            {"lora_target_modules": "qeury", "lora_rank": 4},
            "lora_target_modules: found qeury; expected all-linear, or some of dense, key, query, value",
        ),
        ({"lora_target_modules": "all-linear,query", "lora_rank": 4}, "all-linear takes no other names"),
    ],
)
def test_what_makes_no_sense_is_said_before_training(base_flags, changes, said, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:  # the parser ends the process itself
        train_here(**base_flags | changes)
    assert re.search(said, f"{caught.value} {capsys.readouterr().err}")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_without_peft_it_is_said_before_the_data_are_read(base_flags, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a)
    )
    with pytest.raises(UserError, match=r"lora_rank: peft is not installed; pip install '\.\[peft\]'"):
        train_here(**base_flags | {"lora_rank": 4, "dataset_name": "/nowhere"})


@pytest.mark.parametrize("recipe", ["weights", "lora"], indirect=True)
def test_a_regression_is_exported_in_its_own_unit_by_every_recipe(config, recipe, kinds, tmp_path):
    words = config | recipe | {"dataset_name": kinds / "scores", "label_column_name": "score"}
    assert train_here(**words, output_dir=tmp_path / "run") == 0
    scored = {"model_name_or_path": tmp_path / "run/best", "config": tmp_path / "run/config.yaml"}
    assert score_here(**scored, output_dir=tmp_path / "scored") == 0
    ours, again = (json.loads((tmp_path / f / "results.json").read_text()) for f in ("run", "scored"))
    for name in ("mse", "mae", "spearmanr"):
        assert again[f"test/{name}"] == pytest.approx(ours[f"test/{name}"], rel=1e-4), name
    assert 0 < ours["test/mae"] < 60
