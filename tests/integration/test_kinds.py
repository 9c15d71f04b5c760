"""Every kind of text classification, and every loss: the same on any launch and after any stop, exported so
that others can use it, and blind to the test rows."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same, results_in, without_timing
from conftest import FORKS, flags, launch, metrics_of, score_here, series, train_here, write_csv
from safetensors.torch import load_file

from ft.errors import UserError
from ft.tasks.text_classification.thresholds import CANDIDATES

KINDS = {
    "class weights": ("reviews", {"class_weights": "bad=3,good=0.5"}),
    "balanced classes, smoothed": ("reviews", {"class_weights": "balanced", "label_smoothing_factor": 0.1}),
    "focal": ("reviews", {"focal_gamma": 2, "label_smoothing_factor": 0.1}),
    "tags": ("tags", {"pos_weight": "balanced", "threshold_mode": "per_label"}),
    "focal tags": ("tags", {"focal_gamma": 1.5, "pos_weight": '{"rare": 4}'}),
    "scores": ("scores", {"label_column_name": "score"}),
    "pairs": ("pairs", {"text_column_names": "one,two"}),
    "windows": ("reviews", {"max_length": 12, "long_text": "windows", "learning_rate": 5e-3}),
    "head and tail": ("reviews", {"max_length": 12, "long_text": "head_tail"}),
}
TASKS = ("focal", "tags", "scores", "pairs")  # one of each kind


def words_of(name, tiny_model, reviews, kinds):
    """Flags for 40 updates of one of the kinds, evaluated every 10."""
    data, options = KINDS[name]
    return {
        "model_name_or_path": tiny_model, "dataset_name": reviews if data == "reviews" else kinds / data,
        "learning_rate": 3e-3, "num_train_epochs": 9, "max_train_steps": 40, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no", "max_grad_norm": 0.5, **options,
    }  # fmt: skip


@pytest.fixture
def config(request, tiny_model, reviews, kinds):
    """See `words_of`."""
    return words_of(request.param, tiny_model, reviews, kinds)


@pytest.fixture(scope="module")
def trained(tiny_model, reviews, kinds, tmp_path_factory):
    """The folder of a kind's run on one process, every update as one batch; run once for each."""
    made = {}

    def make(name):
        if name not in made:
            output = tmp_path_factory.mktemp("trained") / "run"
            assert train_here(**words_of(name, tiny_model, reviews, kinds), output_dir=output) == 0
            made[name] = output
        return made[name]

    return make


@pytest.fixture
def whole(request, config, trained):
    """That run for the kind of `config`. Must not be changed."""
    return trained(request.node.callspec.params["config"])


def of_kinds(*names):
    return pytest.mark.parametrize("config", names, indirect=True)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- one result


@pytest.fixture(scope="module")
def on_two(tiny_model, reviews, kinds, tmp_path_factory):
    """Every kind on two processes, in micro-batches, in one launch; the tags are scored by eval.py, too."""
    folder = tmp_path_factory.mktemp("on_two")
    jobs = [
        ("train", flags(**words_of(name, tiny_model, reviews, kinds), per_device_train_batch_size=4,
                        output_dir=folder / name))
        for name in KINDS
    ]  # fmt: skip
    tags = words_of("tags", tiny_model, reviews, kinds)
    jobs.append(("eval", flags(**score_words(folder / "tags/final", tags, folder / "scored"))))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch(FORKS, [str(folder / "jobs.json")], script="tests/several.py")
    assert done.returncode == 0, done.stderr
    return folder


@of_kinds(*KINDS)
def test_accumulation_and_two_processes_give_the_same(config, whole, on_two, request, tmp_path):
    cut, two = tmp_path / "cut", on_two / request.node.callspec.params["config"]
    losses = list(series(whole, "train/loss").values())
    assert min(losses) < 0.95 * losses[0]  # it learns: the comparison is meaningful
    assert train_here(**config, output_dir=cut, per_device_train_batch_size=4) == 0
    for other in (cut, two):
        assert_same(whole, other)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, two)]
    assert set(results[0]) == set(results[1]) and results[0]["best/step"] == results[1]["best/step"]
    for key in results[0].keys() & {
        "eval/accuracy",
        "eval/f1_micro",
    }:  # with the same thresholds as its interval
        assert results[0][f"{key}_low"] <= results[0][key] <= results[0][f"{key}_high"]


def assert_close(one, other, key):
    """The same tables by name, and the same numbers except for the bias of an exported regression head, whose
    32 bits are in another unit."""
    if isinstance(one, dict | list):
        assert len(one) == len(other), key
        names = one if isinstance(one, dict) else range(len(one))
        for name in names:
            assert_close(one[name], other[name], f"{key}: {name}")
    else:
        assert one == (pytest.approx(other, rel=1e-6) if isinstance(one, float) else other), key


def test_rows_weigh_by_their_class_and_not_by_their_micro_batch(tiny_model, reviews, tmp_path):
    """The logged loss is the weighted mean over the rows of an update, computed by hand."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = {
        "model_name_or_path": tiny_model, "dataset_name": reviews, "max_train_steps": 1, "logging_steps": 1,
        "config_overrides": "hidden_dropout_prob=0,attention_probs_dropout_prob=0", "eval_strategy": "no",
        "global_batch_size": 203, "per_device_train_batch_size": 13, "class_weights": "bad=3,good=0.5",
    }  # fmt: skip
    # A learning rate that changes nothing: the loss is that of the exported model.
    assert train_here(**words, learning_rate=1e-30, output_dir=tmp_path / "run") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    lines = [line.rpartition(",") for line in (reviews / "train.csv").read_text().splitlines()[1:]]
    inputs = tokenizer([text for text, _, _ in lines], return_tensors="pt", padding=True)
    labels = torch.tensor([model.config.label2id[label] for _, _, label in lines])
    with torch.no_grad():
        logits = model(**inputs).logits
    weights = torch.tensor([{"bad": 3.0, "good": 0.5}.get(name, 1.0) for name in model.config.label2id])
    expected = torch.nn.CrossEntropyLoss(weight=weights)(logits, labels).item()
    assert series(tmp_path / "run", "train/loss")[1] == pytest.approx(expected, rel=1e-5)


@of_kinds(*TASKS)
def test_a_resumed_run_ends_with_the_same_bytes(config, tmp_path):
    words = {**config, "save_strategy": "steps", "save_steps": 8, "save_total_limit": 9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_here(**words, output_dir=whole) == 0
    shutil.copytree(whole, cut)
    for step in (24, 32, 40):
        shutil.rmtree(cut / f"checkpoints/step-{step:08d}")
    shutil.rmtree(cut / "final")
    (cut / "results.json").unlink()
    assert train_here(**words, output_dir=cut, resume_from_checkpoint="latest") == 0
    assert without_timing(whole) == without_timing(cut)
    for name in ("best", "final"):
        assert bytes_of(whole / name) == bytes_of(cut / name)
    assert results_in(whole) == results_in(cut)


@of_kinds(*TASKS)
def test_the_test_labels_change_no_byte_of_best(config, whole, tmp_path):
    """The test split is never used to choose anything."""
    data = shutil.copytree(config["dataset_name"], tmp_path / "data")
    if (data / "test.csv").exists():
        lines = [line.rpartition(",") for line in (data / "test.csv").read_text().splitlines()]
        labels = [label for _, _, label in lines[1:]]
        random.Random(1).shuffle(labels)
        shuffled = [f"{text},{label}" for (text, _, _), label in zip(lines[1:], labels, strict=True)]
        (data / "test.csv").write_text("\n".join([lines[0][0] + "," + lines[0][2], *shuffled]) + "\n")
    else:
        rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
        labels = [row["labels"] for row in rows]
        random.Random(1).shuffle(labels)
        shuffled = [json.dumps({**row, "labels": its}) for row, its in zip(rows, labels, strict=True)]
        (data / "test.jsonl").write_text("\n".join(shuffled) + "\n")
    other = tmp_path / "run"
    assert train_here(**{**config, "dataset_name": data}, output_dir=other) == 0
    assert bytes_of(whole / "best") == bytes_of(other / "best")
    tests = [json.loads((run / "results.json").read_text())["test/loss"] for run in (whole, other)]
    assert tests[0] != tests[1]  # they were shuffled


# --- what users of an export get


def score_words(folder, config, output_dir):
    keys = ("dataset_name", "text_column_names", "label_column_name", "label_delimiter")
    options = {key: value for key, value in config.items() if key in keys}
    return {"model_name_or_path": folder, "output_dir": output_dir, "split": "validation", **options}


def scored(output_dir):
    lines = (output_dir / "predictions.jsonl").read_text().splitlines()
    return json.loads((output_dir / "results.json").read_text()), [json.loads(line) for line in lines]


@of_kinds(*TASKS)
def test_eval_and_pipeline_give_what_training_gave(config, whole, tmp_path, capsys):
    from transformers import pipeline

    trained = json.loads((whole / "results.json").read_text())
    words = score_words(whole / "final", config, tmp_path / "one")
    assert score_here(**words, suspected_label_errors="true") == 0
    is_regression = config["dataset_name"].name == "scores"
    assert ("the fixed share that fits its predictions least" in capsys.readouterr().out) == is_regression
    suspects = (tmp_path / "one/label_errors.jsonl").read_text().splitlines()
    assert suspects and all(0 <= json.loads(line)["label_quality"] <= 1 for line in suspects)
    results, rows = scored(tmp_path / "one")
    for key in [key for key in trained if key.startswith("eval/")]:
        assert_close(trained[key], results[key], key)
    assert [row["row"] for row in rows] == list(range(61))
    classify = pipeline("text-classification", model=str(whole / "final"))
    texts = [row["text"] if "text" in row else {"text": row["one"], "text_pair": row["two"]} for row in rows]
    for row, answer in zip(rows, classify(texts, top_k=None, truncation=True), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        if "probabilities" not in row:
            assert list(scores) == ["score"]  # the name of the column, and the number in its original unit
            assert row["prediction"] == pytest.approx(scores["score"], rel=1e-5)
            continue
        assert scores == pytest.approx(row["probabilities"], abs=1e-5)
        if isinstance(row["prediction"], list):
            limits = classify.model.config.thresholds
            assert row["prediction"] == [
                name for name in row["probabilities"] if scores[name] >= limits[name]
            ]
            assert isinstance(row["label"], list)
        else:
            assert row["prediction"] == max(scores, key=scores.get)


def test_eval_on_two_processes_gives_what_training_gave(on_two):
    trained = json.loads((on_two / "tags/results.json").read_text())
    results, rows = scored(on_two / "scored")
    keys = [key for key in trained if key.startswith("eval/")]
    assert keys == [key for key in results if key.startswith("eval/")]
    for key in keys:
        assert_close(trained[key], results[key], key)
    assert [row["row"] for row in rows] == list(range(61))


@of_kinds("tags", "scores")
def test_seeds_intervals_slices_and_comparisons(config, tmp_path, capsys):
    column = config.get("label_column_name", "labels")
    words = {**config, "eval_steps": 20, "num_seeds": 2, "slice_columns": column}
    short, deep = tmp_path / "short", tmp_path / "deep"
    assert train_here(**{**words, "max_train_steps": 1}, output_dir=short) == 0
    assert train_here(**words, output_dir=deep) == 0
    together = json.loads((deep / "results.json").read_text())
    one = json.loads((deep / "seed-42/results.json").read_text())
    assert list(together["runs"]) == ["seed-42", "seed-43"]
    for name in one["headline"]:
        values = [run[f"test/{name}"] for run in together["runs"].values()]
        assert together[f"test/{name}"] == pytest.approx(np.mean(values))
        assert together[f"test/{name}_std"] == pytest.approx(np.std(values, ddof=1))
        assert one[f"test/{name}_low"] <= one[f"test/{name}"] <= one[f"test/{name}_high"]
    for table in (one["test/slices"][column], one["test/length_slices"]):
        assert sum(part["rows"] for part in table) == 47
        assert all(f"{name}_low" in part for part in table for name in one["headline"])
    assert len(one["test/worst_errors"]) > 5 and ("test/ece_scaled" in one) == (column == "labels")
    capsys.readouterr()
    assert score_here(compare=f"{short},{deep}", output_dir=tmp_path / "compared") == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "compared/comparison.json").read_text())
    for name in one["headline"]:
        assert found["metrics"][name]["b"] == pytest.approx(together[f"test/{name}"], abs=1e-4)
        assert f"\n{name} " in shown
    best = found["metrics"]["mse" if column == "score" else "f1_macro"]
    assert best["low"] < best["difference"] < best["high"]
    assert (best["difference"] < 0) == (column == "score")
    assert ("f1_micro_at_0.5" in found["metrics"]) == (column == "labels")


@of_kinds("scores")
def test_numbers_come_back_in_their_own_unit(config, tmp_path, capsys):
    assert train_here(**config, output_dir=tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "regression of 'score', mean 4" in said and "test: spearmanr" in said
    assert score_here(**score_words(tmp_path / "run/best", config, tmp_path / "scored")) == 0
    results, rows = scored(tmp_path / "scored")
    predicted, true = (np.array([row[key] for row in rows]) for key in ("prediction", "label"))
    assert 20 < predicted.mean() < 80 and results["eval/mse"] == pytest.approx(
        np.mean((predicted - true) ** 2)
    )
    exported = json.loads((tmp_path / "run/best/config.json").read_text())
    lines = (config["dataset_name"] / "train.csv").read_text().splitlines()[1:]
    training = np.array([float(line.rpartition(",")[2]) for line in lines])
    assert exported["target_mean"] == pytest.approx(training.mean())
    assert exported["target_std"] == pytest.approx(training.std())
    # The loss is the mean squared error in units of the training rows' variance.
    assert results["eval/loss"] == pytest.approx(results["eval/mse"] / training.var(), rel=1e-4)


@of_kinds("scores")
def test_an_exported_head_comes_back_to_the_bit(config, tmp_path, monkeypatch):
    """What was trained, what was exported, and what was read again for the test rows are the same."""
    import ft.model

    states = []
    original = ft.model.load_weights

    def spy(model, folder, accelerator, task):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        original(model, tmp_path / "run/final", accelerator, task)
        states.append((before, {k: v.clone() for k, v in model.state_dict().items()}))
        original(model, folder, accelerator, task)

    for module in list(sys.modules.values()):
        if getattr(module, "load_weights", None) is original and module.__name__.startswith("ft."):
            monkeypatch.setattr(module, "load_weights", spy)
    words = {**config, "metric_for_best_model": "mse", "greater_is_better": "true"}  # not the last step
    assert train_here(**words, output_dir=tmp_path / "run") == 0
    (before, after), *_ = states
    assert all(torch.equal(before[name], after[name]) for name in before)


@of_kinds("scores")
def test_a_regression_goes_on_from_an_exported_one(config, whole, tmp_path):
    """Its head is reused, whatever the unit: the first loss is that of the exported model."""
    words = {**config, "model_name_or_path": whole / "final", "max_train_samples": 100}
    words |= {"learning_rate": 1e-30, "max_train_steps": 1, "eval_steps": 1}
    assert train_here(**words, output_dir=tmp_path / "on") == 0
    first, last = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "on", whole))
    assert first["eval/mse"] == pytest.approx(last["eval/mse"], rel=1e-4)


@of_kinds("tags")
@pytest.mark.parametrize("weight", ["none", "balanced", "rare=3"])
def test_a_new_head_says_how_often_each_label_is_and_a_trained_one_stays(config, tmp_path, weight):
    still = {"learning_rate": 1e-30, "max_train_steps": 1, "weight_decay": 0, "pos_weight": weight}
    assert train_here(**config | still, output_dir=tmp_path / "run") == 0
    bias = load_file(tmp_path / "run/final/model.safetensors")["classifier.bias"].numpy()
    lines = (Path(config["dataset_name"]) / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line)["labels"] for line in lines]
    counts = np.array([sum(name in row for row in rows) for name in ("bad", "good", "long", "rare")])
    odds = (counts + 0.5) / (len(rows) - counts + 0.5)
    odds *= {"none": 1, "balanced": (len(rows) - counts) / counts, "rare=3": [1, 1, 1, 3]}[weight]
    assert bias == pytest.approx(np.log(odds), abs=1e-5)
    again = config | still | {"model_name_or_path": tmp_path / "run/final", "max_train_samples": 20}
    assert train_here(**again, output_dir=tmp_path / "again") == 0
    assert load_file(tmp_path / "again/final/model.safetensors")["classifier.bias"].numpy() == pytest.approx(
        bias
    )


@of_kinds("tags")
def test_thresholds_are_chosen_on_validation_and_go_with_the_model(config, tmp_path):
    from sklearn.metrics import f1_score

    config |= {"learning_rate": 1e-2, "max_train_steps": 150, "num_train_epochs": 99, "eval_steps": 50}
    del config["pos_weight"]
    assert train_here(**config, output_dir=tmp_path / "run") == 0
    rows = [row for row in metrics_of(tmp_path / "run") if "eval/f1_micro" in row]
    best = max(rows, key=lambda row: row["eval/f1_micro"])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/step"] == best["step"] and results["best/f1_micro"] == best["eval/f1_micro"]
    assert best["eval/f1_macro"] >= best["eval/f1_macro_at_0.5"]
    thresholds = json.loads((tmp_path / "run/best/config.json").read_text())["thresholds"]
    assert list(thresholds) == ["bad", "good", "long", "rare"] and len(set(thresholds.values())) > 1
    assert score_here(**score_words(tmp_path / "run/best", config, tmp_path / "scored")) == 0
    scores, rows = scored(tmp_path / "scored")
    truth, said = (
        np.array([[name in row[key] for name in thresholds] for row in rows])
        for key in ("label", "prediction")
    )
    assert (
        scores["eval/f1_micro"]
        == best["eval/f1_micro"]
        == pytest.approx(f1_score(truth, said, average="micro"))
    )
    probability = np.array([[row["probabilities"][name] for name in thresholds] for row in rows])
    at_half = f1_score(truth, probability >= 0.5, average="micro")
    assert scores["eval/f1_micro_at_0.5"] == pytest.approx(at_half)
    for label in range(len(thresholds)):  # no other threshold of the grid is better
        tried = probability[:, label, None] >= CANDIDATES
        hits = (tried & truth[:, label, None]).sum(axis=0)
        best = (2 * hits / (tried.sum(axis=0) + truth[:, label].sum())).max()
        assert f1_score(truth[:, label], said[:, label], zero_division=0) >= best - 1e-12


@of_kinds("focal tags")
def test_one_threshold_or_none(config, whole, tmp_path):
    thresholds = json.loads((whole / "best/config.json").read_text())["thresholds"]
    assert len(thresholds) == 4 and len(set(thresholds.values())) == 1
    words = score_words(whole / "best", config, tmp_path / "at half")
    with pytest.raises(UserError, match="the thresholds that the model holds are global"):
        score_here(**words, threshold_mode="per_label")
    assert score_here(**words, threshold_mode="none") == 0
    results, rows = scored(tmp_path / "at half")
    assert "eval/f1_micro_at_0.5" not in results
    for row in rows:
        assert row["prediction"] == [name for name, p in row["probabilities"].items() if p >= 0.5]
    assert train_here(**config, threshold_mode="none", output_dir=tmp_path / "none") == 0
    assert "thresholds" not in json.loads((tmp_path / "none/best/config.json").read_text())
    row = metrics_of(tmp_path / "none")[-1]
    assert "eval/f1_micro" in row and "eval/f1_micro_at_0.5" not in row
    words = score_words(tmp_path / "none/best", config, tmp_path / "global")
    with pytest.raises(UserError, match="threshold_mode: found global, but the model holds no thresholds"):
        score_here(**words, threshold_mode="global")


@of_kinds(*TASKS)
def test_every_metric_of_the_model_card_but_the_loss_has_an_interval(config, whole):
    card = (whole / "best/README.md").read_text()
    table = card.split("| metric | value |")[1].split("## Settings")[0]
    lines = [line.split(" | ") for line in table.splitlines() if "." in line]
    assert len(lines) > 4
    assert [name for name, value in lines if " to " not in value] == ["| loss"]


@of_kinds(*TASKS)
def test_the_model_card_can_be_followed(config, whole):
    card = (whole / "best/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(whole / "best"))
    *lines, last = code.strip().splitlines()
    names: dict = {}
    exec("\n".join([*lines, f"answer = {last}"]), names)
    if "thresholds" in code:
        assert set(names["answer"]) <= {"bad", "good", "long", "rare"}
    elif "score" in last:
        assert 0 < names["answer"] < 100
    else:
        assert names["answer"][0]["label"] in ("bad", "fine", "good", "other", "same")


# --- what is impossible


def test_a_model_of_another_kind_is_not_scored(kinds, reviews, tiny_model, tmp_path):
    words = {"model_name_or_path": tiny_model, "max_train_steps": 1, "output_dir": tmp_path / "run"}
    assert train_here(**words, dataset_name=kinds / "tags") == 0
    words = {"model_name_or_path": tmp_path / "run/final", "output_dir": tmp_path / "scored"}
    with pytest.raises(UserError, match=r"'label' holds texts \('.*' in row 0\); set label_delimiter"):
        score_here(**words, dataset_name=reviews)
    with pytest.raises(UserError, match="problem_type: found regression, but the model was trained"):
        score_here(**words, dataset_name=kinds / "tags", problem_type="regression")


def test_a_pair_with_one_side_empty_is_named(tiny_model, tmp_path):
    rows = [{"one": "the film", "two": "the book", "label": label} for label in ("same", "other") * 4]
    rows[3]["two"], rows[6]["one"] = "", " "
    words = {"model_name_or_path": tiny_model, "text_column_names": "one,two", "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match=r"one is only white space: row 6; two is empty: row 3;"):
        train_here(**words, train_file=write_csv(tmp_path / "t.csv", rows))


@pytest.mark.parametrize(
    "data, options, said",  # score is the label of scores
    [
        ("reviews", {"class_weights": "bad=2,best=3"}, "class_weights: no training row has the label 'best'"),
        ("tags", {"pos_weight": "bad=2,best=3"}, "pos_weight: no training row has the label 'best'"),
        ("reviews", {"threshold_mode": "global"}, "threshold_mode: is for multi_label_classification"),
        ("scores", {"class_weights": "balanced"}, "a number has no classes"),
        (
            "scores",
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor: is",
        ),
        ("tags", {"label_smoothing_factor": 0.1}, "label_smoothing_factor: is for single_label"),
        ("tags", {"class_weights": "balanced"}, "its counterpart is pos_weight"),
        ("reviews", {"problem_type": "regression"}, "found 'fine', 'bad', 'good', expected a finite number"),
        ("tags", {"problem_type": "single_label_classification"}, "for lists of labels, set problem_type"),
        ("tags", {"metric_for_best_model": "accuracy"}, "found 'accuracy', expected one of f1_micro"),
        (
            "scores",
            {"metric_for_best_model": "f1_macro"},
            "expected one of mse",
        ),
        ("scores", {"metrics": "f1"}, "'f1' is not for this kind of label"),
    ],
)
def test_options_that_do_not_fit_the_labels(data, options, said, reviews, kinds, tiny_model, tmp_path):
    place = reviews if data == "reviews" else kinds / data
    options |= {"label_column_name": "score"} if data == "scores" else {}
    with pytest.raises(UserError, match=said) as error:
        train_here(model_name_or_path=tiny_model, dataset_name=place, output_dir=tmp_path / "run", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
