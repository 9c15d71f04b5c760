"""A whole run: what it leaves behind, what can be loaded from it, when it evaluates, saves and stops."""

import csv
import json
import shutil
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from compare import assert_same, same_bits
from conftest import (
    FORK,
    FORKS,
    ONE,
    changed_train,
    flags,
    launch,
    make_rows,
    metric_in,
    metrics_of,
    score_here,
    series,
    train_here,
    two_processes,
    write_csv,
)
from safetensors.torch import load_file, save_file

import ft.invariance
from ft import checkpoint
from ft.cli import parse
from ft.config import Config
from ft.durable import find_damage
from ft.errors import UserError
from ft.last_layer import narrow_last_layer


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_whole_table_of_the_word_embeddings_learns_the_same(base_flags, tmp_path, monkeypatch, capsys):
    """Tokens in no text are left out of training and checkpoints, but not of exported models."""
    table, size = "bert.embeddings.word_embeddings.weight", 72
    words = {**base_flags, "weight_decay": 0.1, "ema_decay": 0.9}
    assert train_here(**words) == 0
    assert f"; of {size} word embeddings, the 43 that the data needs are trained" in capsys.readouterr().out
    monkeypatch.setattr("ft.words.train_used_words", lambda *_: None)
    assert train_here(**{**words, "output_dir": tmp_path / "whole"}) == 0
    assert "are trained" not in capsys.readouterr().out
    assert_same(tmp_path / "run", tmp_path / "whole")
    runs = [tmp_path / "run", tmp_path / "whole"]
    for name in ("best", "final"):
        found, expected = (load_file(run / name / "model.safetensors")[table] for run in runs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    results, others = (json.loads((run / "results.json").read_text()) for run in runs)
    for key in ("best/step", "test/accuracy"):
        assert results[key] == others[key]
    left = others["train/trainable_parameters"] - results["train/trainable_parameters"]
    assert left == 32 * (size - 43)
    assert results["test/loss"] == pytest.approx(others["test/loss"], rel=1e-5)
    last = "checkpoints/step-00000014/model.safetensors"
    assert [len(load_file(run / last)[table]) for run in runs] == [44, size]


def test_a_run_leaves_exactly_these_files(base_flags, tmp_path):
    assert train_here(**base_flags, drawn=True) == 0
    model = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    checkpoint = ["manifest.json", "model.safetensors", "optimizer.pt", "state.json"]
    expected = ["config.yaml", "environment.json", "metrics.jsonl", "report.html"]
    expected += ["results.json", "training.png"]
    expected += [f"{name}/{file}" for name in ("best", "final") for file in model]
    expected += [f"checkpoints/step-{step:08d}/{file}" for step in (7, 14) for file in checkpoint]
    expected += ["checkpoints/latest"]
    assert files_of(tmp_path / "run") == sorted(expected)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000014\n"


def test_older_names_of_weights_are_read_and_the_present_ones_written(tiny_model, base_flags, tmp_path):
    """bert-base-cased has LayerNorm.gamma and .beta. Transformers reads them under new names, and would
    return to the old ones in saving; the best model, which is reloaded for the test rows, must have the
    model's own."""
    old = shutil.copytree(tiny_model, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    for new, former in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        weights = {name.replace(new, former): values for name, values in weights.items()}
    assert sum(".gamma" in name for name in weights) > 2
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    words = {**base_flags, "model_name_or_path": old, "metric_for_best_model": "loss"}
    assert train_here(**words, greater_is_better="true") == 0  # the best is not the last update
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/step"] == 7 and "test/loss" in results
    assert train_here(**{**base_flags, "output_dir": tmp_path / "other"}) == 0
    assert same_bits(tmp_path / "run/final", tmp_path / "other/final")


def test_metrics_and_results_have_the_promised_keys(base_flags, tmp_path):
    assert train_here(**base_flags) == 0
    rows = metrics_of(tmp_path / "run")
    train = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in train] == list(range(1, 15))
    assert set(train[0]) == {
        "step", "epoch", "train/loss", "train/learning_rate", "train/grad_norm", "perf/examples_per_second",
        "perf/tokens_per_second", "perf/padding_share", "perf/data_wait_share", "data/rows", "data/tokens",
        *(
            f"perf/rank_{name}_{end}"
            for name in ("tokens_per_second", "padding_share", "data_wait_share")
            for end in ("min", "mean", "max")
        ),
    }  # fmt: skip
    evaluated = [r for r in rows if "eval/loss" in r]
    assert [r["step"] for r in evaluated] == [7, 14]
    results = json.loads((tmp_path / "run/results.json").read_text())
    numbers = (
        "eval/accuracy eval/f1_macro eval/f1_weighted eval/matthews_correlation eval/auroc best/step "
        "best/accuracy test/accuracy train/total_steps perf/tokens_per_second"
    )
    for key in numbers.split():
        assert isinstance(results[key], int | float), key
    assert results["train/total_steps"] == 14
    assert np.sum(results["eval/confusion_matrix"]) == 61 and np.sum(results["test/confusion_matrix"]) == 47
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["world_size"] == 1 and environment["versions"]["torch"].startswith(
        torch.__version__[:3]
    )


def test_total_seconds_are_those_of_the_whole_run_with_the_scoring_of_the_test_rows(
    base_flags, tmp_path, monkeypatch
):
    from ft import finish

    last_score, took = finish._last_score, []

    def timed(run, split):
        scored = last_score(run, split)
        took.append(time.monotonic() - run.began)
        return scored

    monkeypatch.setattr(finish, "_last_score", timed)
    assert train_here(**base_flags) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert took and results["perf/total_seconds"] >= max(took)


def test_seconds_of_training_are_without_those_of_evaluations_and_saves(base_flags, tmp_path, monkeypatch):
    import ft.run
    import ft.saver

    def slow(function):
        def slowed(*args, **options):
            time.sleep(3)
            return function(*args, **options)

        return slowed

    monkeypatch.setattr(ft.run, "evaluate", slow(ft.run.evaluate))
    monkeypatch.setattr(ft.saver, "write_checkpoint", slow(ft.saver.write_checkpoint))
    assert train_here(**base_flags, max_train_steps=3) == 0  # one evaluation and one save, at the end
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["perf/train_seconds"] < 3 and results["perf/total_seconds"] > 6
    rate = 3 * 32 / results["perf/train_seconds"]
    assert results["perf/examples_per_second"] == pytest.approx(rate)


def test_config_yaml_repeats_the_run(base_flags, tmp_path):
    assert train_here(**base_flags, per_device_train_batch_size=8, gradient_accumulation_steps=2) == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["global_batch_size"] == 16 and config["gradient_accumulation_steps"] is None
    assert train_here(config=tmp_path / "run/config.yaml", output_dir=tmp_path / "again") == 0
    assert series(tmp_path / "run", "train/loss") == series(tmp_path / "again", "train/loss")


@pytest.fixture(scope="module")
def short_texts(tiny_model, reviews, tmp_path_factory):
    """A run on texts of 40 tokens at most."""
    output = tmp_path_factory.mktemp("short_texts") / "run"
    words = {"model_name_or_path": tiny_model, "dataset_name": reviews, "learning_rate": 1e-3}
    assert train_here(**words, num_train_epochs=2, max_length=40, output_dir=output) == 0
    return output


@pytest.mark.parametrize("name", ["best", "final"])
def test_exported_models_load_in_a_pipeline_with_the_label_names_and_the_same_logits(
    short_texts, reviews, tmp_path, name
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    folder = short_texts / name
    classify = pipeline("text-classification", model=str(folder), top_k=None)
    answer = classify(["the film was superb"], truncation=True)[0]
    assert {entry["label"] for entry in answer} == {"bad", "fine", "good"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 40  # later texts are cut where the training texts were
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    assert model.config._attn_implementation == "sdpa"
    # eval.py's scores are those of the model as anyone loads it.
    assert score_here(model_name_or_path=folder, dataset_name=reviews, output_dir=tmp_path / "scored") == 0
    for line in (tmp_path / "scored/predictions.jsonl").read_text().splitlines()[:10]:
        row = json.loads(line)
        logits = model(**tokenizer(row["text"], return_tensors="pt", truncation=True)).logits[0]
        assert np.allclose(list(row["probabilities"].values()), logits.softmax(0).tolist(), atol=1e-5)
        assert row["prediction"] == model.config.id2label[int(logits.argmax())]


def test_the_model_in_memory_and_the_exported_one_give_the_same_logits(base_flags, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    import ft.finish

    kept = {}
    finish = ft.finish.finish

    def spy(run):
        kept["model"] = run.model
        finish(run)

    monkeypatch.setattr(ft.finish, "finish", spy)
    assert train_here(**{**base_flags, "num_train_epochs": 1}) == 0
    ids = torch.randint(4, 30, (3, 11))
    mask = torch.ones_like(ids)
    before = kept["model"].eval()(input_ids=ids, attention_mask=mask).logits
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/final").eval()
    assert torch.allclose(before, exported(input_ids=ids).logits, rtol=0, atol=1e-6)  # all positions
    assert narrow_last_layer(exported) == []
    assert torch.equal(before, exported(input_ids=ids, attention_mask=mask).logits)  # one, as in memory


def test_eval_gives_the_numbers_that_training_gave_on_one_process_and_on_two(base_flags, tmp_path):
    assert train_here(**base_flags, resampled=True) == 0
    trained = json.loads((tmp_path / "run/results.json").read_text())
    words = [str(tmp_path / "run/config.yaml"), *flags(model_name_or_path=tmp_path / "run/final")]
    for command, name in ((FORK, "one"), (two_processes(), "two")):
        place = flags(output_dir=tmp_path / name, split="validation")
        done = launch(command, [*words, *place], script="eval.py", resampled=True)
        assert done.returncode == 0, done.stderr
        scored = json.loads((tmp_path / name / "results.json").read_text())
        assert {k: v for k, v in scored.items() if k.startswith("eval/")} == {
            k: v for k, v in trained.items() if k.startswith("eval/")
        }
        rows = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        assert [row["row"] for row in rows] == list(range(61))


def test_old_checkpoints_go_after_the_new_one_stands(base_flags, tmp_path, monkeypatch):
    rename, gone = checkpoint._rename, []

    def noted(path, name):
        newest = path.with_name((path.parent / "latest").read_text().strip())
        gone.append((path.name[-2:], newest.name[-2:], find_damage(newest, *checkpoint.FILES)))
        return rename(path, name)

    monkeypatch.setattr(checkpoint, "_rename", noted)
    assert train_here(**base_flags, save_strategy="steps", save_steps=3, save_total_limit=2) == 0
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == ["step-00000012", "step-00000014"]
    assert gone == [("03", "09", ""), ("06", "12", ""), ("09", "14", "")]


def test_a_gain_below_the_threshold_costs_patience(base_flags, tmp_path):
    words = {
        **base_flags,
        "num_train_epochs": 9,
        "metric_for_best_model": "loss",
        "early_stopping_patience": 2,
    }
    assert train_here(**words, early_stopping_threshold=1.0) == 0  # the first is the one to beat
    losses = list(series(tmp_path / "run", "eval/loss").values())
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_early_stopping_counts_evaluations_without_a_gain(base_flags, tmp_path, capsys):
    words = {**base_flags, "learning_rate": 1e-12, "num_train_epochs": 9, "early_stopping_patience": 2}
    words |= {"logging_steps": 10}
    assert train_here(**words) == 0
    rows = metrics_of(tmp_path / "run")
    assert [r["step"] for r in rows if "eval/loss" in r] == [7, 14, 21]
    assert [r["step"] for r in rows if "train/loss" in r] == [10, 20, 21]  # none is lost
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert [r.get("train/loss") for r in metrics_of(tmp_path / "run")] == [r.get("train/loss") for r in rows]
    assert "stopped early" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/results.json").read_text())["best/step"] == 7


def test_what_a_model_keeps_of_an_evaluation_can_be_trained_with(base_flags, monkeypatch):
    """Such as position tables, which some models rebuild if a text is longer than all before."""
    from transformers.models.bert.modeling_bert import BertEmbeddings

    kept, forward = [], BertEmbeddings.forward

    def keeping(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not self.training:
            kept[:] = [torch.ones_like(out)[:1, :1]]
        return out * kept[0] if kept else out

    monkeypatch.setattr(BertEmbeddings, "forward", keeping)
    assert train_here(**base_flags | {"eval_strategy": "steps", "eval_steps": 1, "max_train_steps": 3}) == 0


def test_speed_is_of_all_starts_of_a_run(base_flags, tmp_path):
    """Also if the last start had nothing left to do."""
    for epochs in (1, 2, 2):
        words = {**base_flags, "num_train_epochs": epochs, "resume_from_checkpoint": "latest"}
        assert train_here(**words) == 0
        results = json.loads((tmp_path / "run/results.json").read_text())
        rows = results["perf/examples_per_second"] * results["perf/train_seconds"]
        assert rows == pytest.approx(203 * epochs)
        assert results["perf/train_seconds"] > 0.01  # a start without updates takes a thousandth


def test_a_metric_that_is_never_defined_is_said_and_stops_nothing(base_flags, reviews, tmp_path, capsys):
    data = shutil.copytree(reviews, tmp_path / "data")
    header, *lines = (data / "validation.csv").read_text().splitlines(keepends=True)
    (data / "validation.csv").write_text(header + "".join(x for x in lines if x.endswith("good\n")))
    words = {**base_flags, "dataset_name": data, "metric_for_best_model": "auroc", "num_train_epochs": 3}
    assert train_here(**words, early_stopping_patience=1) == 0
    said = capsys.readouterr().out
    assert said.count("auroc is not defined on the validation rows") == 1 and "stopped early" not in said
    assert said.count(": validation auroc undefined, loss ") == 3  # a line for each evaluation
    assert "auroc was never defined on the validation rows, so best/ is the model of the last update" in said
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/auroc"] is None and results["best/step"] == results["train/total_steps"] == 21


def test_patience_without_validation_rows_is_refused(base_flags, reviews, tmp_path):
    words = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    words["train_file"] = reviews / "train.csv"
    with pytest.raises(UserError, match="early_stopping_patience: found 1, but there are no validation rows"):
        train_here(**words, validation_split_percentage=0, early_stopping_patience=1)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_lower_loss_is_better_and_best_is_the_step_with_the_lowest(base_flags, tmp_path):
    words = {**base_flags, "learning_rate": 1e-2, "num_train_epochs": 5, "metric_for_best_model": "eval_loss"}
    assert train_here(**words) == 0
    losses = series(tmp_path / "run", "eval/loss")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/step"] == min(losses, key=losses.get) and results["best/loss"] == min(
        losses.values()
    )
    # All of its metrics, not only the one that selected it.
    (of_best,) = [
        row
        for row in metrics_of(tmp_path / "run")
        if "eval/loss" in row and row["step"] == results["best/step"]
    ]
    names = [key.removeprefix("eval/") for key in of_best if key.startswith("eval/") and key != "eval/rows"]
    assert "f1_macro" in names and all(results[f"best/{name}"] == of_best[f"eval/{name}"] for name in names)


ERROR_RATE = '{"error_rate": np.float32(np.mean(np.array(predictions) != references))}'


@pytest.mark.parametrize("command", [None, FORKS], ids=["one", "two processes"])
def test_a_metric_of_a_folder_chooses_the_best_model(base_flags, tmp_path, capsys, command):
    metric = metric_in(tmp_path / "errors", ERROR_RATE)
    words = {**base_flags, "learning_rate": 3e-3, "metric_for_best_model": "error_rate"}
    words["metrics"] = f"{metric},f1"
    if command is None:
        assert train_here(**words) == 0
        said = capsys.readouterr().out
    else:
        done = launch(command, flags(**words))
        assert done.returncode == 0, done.stderr
        said = done.stdout
    assert "note: metric f1: f1_macro, computed here" in said
    assert "best: the model with the lowest error_rate on the validation rows" in said
    rates, accuracy = (series(tmp_path / "run", f"eval/{name}") for name in ("error_rate", "accuracy"))
    assert rates == pytest.approx({step: 1 - value for step, value in accuracy.items()}, abs=1e-6)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/error_rate"] == min(rates.values())
    assert results["eval/f1"] == results["eval/f1_macro"]


def test_the_number_that_chooses_is_one_that_a_metric_gives(base_flags, tmp_path):
    metric = metric_in(tmp_path / "errors", ERROR_RATE)
    with pytest.raises(
        UserError, match=r"metric_for_best_model: found 'errors', expected one of .*error_rate"
    ):
        train_here(**base_flags, metrics=metric, metric_for_best_model="errors")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_bar_in_an_option_ends_no_cell_of_the_card():
    from ft.card import _settings
    from ft.config import Config

    assert r"""| label_delimiter | `"\|"` |""" in _settings(Config(label_delimiter="|"))


def test_the_card_has_the_revision_and_the_tokenizer_of_a_model_but_no_path(tiny_model):
    from ft.card import _settings
    from ft.config import Config

    settings = _settings(Config(model_revision="v2", tokenizer_name=str(tiny_model)))
    assert '| model_revision | `"v2"` |' in settings
    assert f'| tokenizer_name | `"{tiny_model.name}"` |' in settings


def test_the_card_says_that_validation_rows_chose_the_best_model_and_not_the_last(base_flags, tmp_path):
    assert train_here(**base_flags) == 0
    best, final = ((tmp_path / "run" / name / "README.md").read_text() for name in ("best", "final"))
    assert "The validation rows chose this model among those of other updates, and its temperature" in best
    assert "chose this model" not in final and "The validation rows chose its temperature" in final


def test_the_card_of_a_second_training_names_what_the_first_began_with(base_flags, tmp_path):
    words = base_flags | {"max_train_steps": 1}
    assert train_here(**words) == 0
    card = tmp_path / "run/best/README.md"
    assert "base_model" not in card.read_text()  # a path of this machine
    card.write_text(card.read_text().replace("---\n", '---\nbase_model: "our-team/encoder"\n', 1))
    assert (
        train_here(**words | {"model_name_or_path": tmp_path / "run/best", "output_dir": tmp_path / "b"}) == 0
    )
    second = (tmp_path / "b/best/README.md").read_text()
    assert second.count('base_model: "our-team/encoder"\n') == 1 and "# run, fine-tuned\n" in second


def test_a_config_whose_evaluations_fell_away_is_read_back(base_flags, reviews, tmp_path):
    words = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    words |= {"train_file": reviews / "train.csv", "validation_split_percentage": 0, "max_train_steps": 1}
    assert train_here(**words, eval_strategy="steps", eval_steps=5) == 0
    config = parse(Config, [str(tmp_path / "run" / "config.yaml")])
    assert (config.eval_strategy, config.eval_steps) == ("no", None)


def test_without_evaluation_best_is_final_and_it_is_said(base_flags, tmp_path, capsys):
    assert train_here(**base_flags, eval_strategy="no") == 0
    assert "not evaluated" in capsys.readouterr().out
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == (
        tmp_path / "run/final/model.safetensors"
    ).read_bytes()


def test_validation_rows_that_nothing_scores_are_said(base_flags, reviews, tmp_path, capsys):
    words = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    words |= {"train_file": reviews / "train.csv", "eval_strategy": "no", "max_train_steps": 1}

    def said(**more):
        capsys.readouterr()
        assert train_here(**words, **more, overwrite_output_dir="true") == 0
        return [line for line in capsys.readouterr().out.splitlines() if "not scored" in line]

    plain = "note: the validation rows are not scored (eval_strategy: no)"
    assert said() == [f"{plain}; validation_split_percentage: 0 trains on them"]
    assert said(validation_file=reviews / "validation.csv") == [plain]
    assert said(validation_split_percentage=0) == []


def test_an_update_has_no_more_rows_than_there_are(base_flags, reviews, tmp_path, capsys):
    words = base_flags | {"max_train_steps": 1, "global_batch_size": 500}
    assert train_here(**words, drawn=True) == 0
    said = capsys.readouterr().out
    assert (
        "note: global_batch_size is 500, but there are 203 training rows: each update has all of them" in said
    )
    assert "updates: 1 (1 an epoch); global batch 203 = 1 process x 203 rows x 1 accumulation step" in said
    assert "1 updates of\n203 rows." in (tmp_path / "run/final/README.md").read_text()
    assert "1 updates of 203 rows" in (tmp_path / "run/report.html").read_text()
    words |= {"global_batch_size": 203, "overwrite_output_dir": "true"}
    assert train_here(**words) == 0
    assert "each update has all" not in capsys.readouterr().out


def test_max_time_saves_a_checkpoint_and_exits_with_75(base_flags, tmp_path):
    words = flags(**{**base_flags, "num_train_epochs": 1000, "max_time": "1s", "save_strategy": "no"})
    done = launch(ONE, words)  # a fork counts from the start of the server
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "run/checkpoints/latest").exists() and "resume" in done.stdout


def test_an_evaluation_loss_is_the_mean_over_rows_not_over_batches(base_flags, tmp_path):
    """61 rows in batches of 20: a mean of batch means would weight the last row 20 times."""
    results = []
    for size in (20, 61):
        output = tmp_path / str(size)
        assert train_here(**{**base_flags, "output_dir": output}, per_device_eval_batch_size=size) == 0
        results.append(json.loads((output / "results.json").read_text())["eval/loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_an_overflow_skips_no_row_and_moves_no_schedule(base_flags, tmp_path, monkeypatch):
    """As with fp16, whose scaler skips a step: the same update is repeated and counted once."""
    from accelerate.optimizer import AcceleratedOptimizer

    assert train_here(**base_flags) == 0
    step, calls = AcceleratedOptimizer.step, {"count": 0}

    def skipping(self, closure=None):
        calls["count"] += 1
        self._is_overflow = calls["count"] in (1, 5, 6)
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", skipping)
    assert train_here(**{**base_flags, "output_dir": tmp_path / "skipped"}) == 0
    assert calls["count"] == 14 + 3
    for key in ("train/loss", "train/learning_rate", "train/grad_norm"):
        assert series(tmp_path / "run", key) == series(tmp_path / "skipped", key)


def test_label_smoothing_is_in_the_training_loss_alone(base_flags, tmp_path):
    words = {**base_flags, "learning_rate": 1e-12, "num_train_epochs": 1, "max_grad_norm": 0}
    for name, smoothing in (("plain", 0.0), ("smooth", 0.3)):
        assert train_here(**{**words, "output_dir": tmp_path / name}, label_smoothing_factor=smoothing) == 0
    evaluated = [series(tmp_path / n, "eval/loss")[7] for n in ("plain", "smooth")]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)
    assert series(tmp_path / "plain", "train/loss") != series(tmp_path / "smooth", "train/loss")


@pytest.mark.parametrize(
    "labels",
    [["1", "2", "10"], ["neg", "neu", "pos"], ["../../x", "<b>", "=CMD()"]],
    ids=["numbers", "names", "odd"],
)
def test_labels_of_any_name(base_flags, tmp_path, labels):
    names = dict(zip(("bad", "fine", "good"), labels, strict=True))
    rows = [{"text": r["text"], "label": names[r["label"]]} for r in make_rows(60)]
    file = write_csv(tmp_path / "data.csv", rows)
    words = {k: v for k, v in base_flags.items() if k != "dataset_name"}
    assert train_here(**{**words, "num_train_epochs": 1}, train_file=file) == 0
    config = json.loads((tmp_path / "run/best/config.json").read_text())
    assert list(config["id2label"].values()) == labels  # 10 after 2: numbers in numerical order


def test_gradient_checkpointing_computes_again_and_changes_no_number(base_flags, tmp_path, monkeypatch):
    from transformers.models.bert.modeling_bert import BertSelfOutput

    calls, forward = [], BertSelfOutput.forward
    monkeypatch.setattr(BertSelfOutput, "forward", lambda *a: calls.append(a[0].training) or forward(*a))
    words = {**base_flags, "max_train_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
    assert train_here(**words) == 0
    once = sum(calls)
    assert train_here(**{**words, "output_dir": tmp_path / "again"}, gradient_checkpointing="true") == 0
    assert sum(calls) - once == once + 4 * 2  # 4 updates of 2 layers a second time
    one, other = series(tmp_path / "run", "train/loss"), series(tmp_path / "again", "train/loss")
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.skipif(
    not shutil.which("g++") or not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    reason="on a CPU, torch.compile needs g++ and Python's headers",
)
def test_compiling_changes_no_number(base_flags, tmp_path, monkeypatch):
    used, compiled = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **k: used.append(1) or compiled(*a, **k))
    words = {**base_flags, "max_train_steps": 3, "eval_strategy": "no"}
    assert train_here(**words) == 0 and not used
    assert train_here(**{**words, "output_dir": tmp_path / "compiled"}, torch_compile="true") == 0 and used
    assert not torch._dynamo.config.optimize_ddp  # which would split the layers' programs
    one, other = series(tmp_path / "run", "train/loss"), series(tmp_path / "compiled", "train/loss")
    assert one == pytest.approx(other, rel=1e-5)


def test_a_compiled_model_is_made_for_the_longest_text_of_the_data_and_not_of_the_model(
    base_flags, tokenizer, monkeypatch
):
    """Dropout tables for 8,192 tokens would take gigabytes, even on texts of twenty."""
    asked = []

    def key_dropout(model, mode, seed, compiled_length):
        asked.append(compiled_length)
        raise KeyboardInterrupt

    monkeypatch.setattr(ft.invariance, "key_dropout", key_dropout)
    for compiles in ("true", "false"):
        with pytest.raises(KeyboardInterrupt):
            train_here(**base_flags, torch_compile=compiles, overwrite_output_dir="true")
    texts = [row["text"] for row in csv.DictReader((base_flags["dataset_name"] / "train.csv").open())]
    assert asked == [max(map(len, tokenizer(texts)["input_ids"])), None]


@pytest.mark.usefixtures("fonts")
def test_nothing_but_lines_where_the_output_is_no_terminal(base_flags):
    done = launch(ONE, flags(**base_flags))
    assert done.returncode == 0
    assert done.stderr == "" and "\r" not in done.stdout


SLOW_WRITER = """
import ft.run
sample = ft.run.weights_sample
def slow(*args):  # the main process alone calls it, for a new best model
    time.sleep(3)
    return sample(*args)
ft.run.weights_sample = slow
"""


def test_no_process_counts_the_time_in_which_it_waits_for_the_main_one_to_write(base_flags, tmp_path):
    script = changed_train(tmp_path / "slow.py", SLOW_WRITER)
    words = {**base_flags, "eval_strategy": "steps", "eval_steps": 2, "max_train_steps": 4}
    done = launch(FORKS, flags(**words), script=script)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics_of(tmp_path / "run") if "train/loss" in row]
    low, high = (rows[2][f"perf/rank_tokens_per_second_{end}"] for end in ("min", "max"))
    assert low > high / 10, rows[2]  # for an update of some hundredths of a second
