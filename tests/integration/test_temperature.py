"""The temperature is fitted only on validation rows, and is exported with the model."""

import csv
import hashlib
import json
import random
import shutil

import pytest
from conftest import score_here, train_here, write_csv

from ft.errors import EXIT_DONE


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def temperature_of(folder):
    return json.loads((folder / "config.json").read_text()).get("calibration_temperature")


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


OPTIONS = {"learning_rate": 3e-3, "num_train_epochs": 6, "logging_steps": 1, "seed": 5}


@pytest.fixture
def config(base_flags):
    return base_flags | OPTIONS


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """A run whose best model is not its last. Must not be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = {"model_name_or_path": tiny_model, "dataset_name": reviews, "output_dir": folder}
    assert train_here(**words, **OPTIONS) == EXIT_DONE
    return folder


def test_shuffling_the_test_labels_changes_no_byte_of_best(config, whole, reviews, tmp_path):
    """The test rows choose nothing: not the step, the weights, the temperature or the card."""
    other = tmp_path / "other"
    for name in ("train", "validation", "test"):
        with open(reviews / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        if name == "test":
            labels = [row["label"] for row in rows]
            random.Random(0).shuffle(labels)
            rows = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
        write_csv(other / f"{name}.csv", rows)
    again = tmp_path / "again"
    assert train_here(**{**config, "dataset_name": other, "output_dir": again}) == EXIT_DONE
    before, after = results_of(whole), results_of(again)
    assert before["test/accuracy"] != after["test/accuracy"]
    assert hashes(whole / "best") == hashes(again / "best")


def test_it_goes_along_with_the_model(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    results = results_of(run)
    assert temperature_of(run / "best") == results["test/temperature"]
    assert results["best/step"] != results["train/total_steps"]
    assert temperature_of(run / "final") != temperature_of(run / "best")
    assert "eval/temperature" not in results and "eval/ece_scaled" not in results  # it was fitted on them
    words = {"config": run / "config.yaml", "model_name_or_path": run / "best", "output_dir": run}
    assert score_here(**words) == EXIT_DONE
    again = results_of(run / "evaluation-test")
    for key in ("temperature", "ece_scaled", "log_loss_scaled", "brier_scaled"):
        assert again[f"test/{key}"] == results[f"test/{key}"]


def test_a_model_that_is_trained_on_brings_no_temperature_of_its_own(config, whole, tmp_path):
    more = {**config, "model_name_or_path": whole / "best", "output_dir": tmp_path / "more"}
    assert train_here(**more, eval_strategy="no", max_train_steps=2) == EXIT_DONE
    assert temperature_of(tmp_path / "more" / "best") is None
    assert "test/temperature" not in results_of(tmp_path / "more")


def test_a_resumed_run_keeps_that_of_its_best_step(config, whole, tmp_path):
    before = results_of(shutil.copytree(whole, tmp_path / "run"))
    assert train_here(**config, resume_from_checkpoint="latest") == EXIT_DONE
    after = results_of(tmp_path / "run")
    assert (
        after["test/temperature"] == before["test/temperature"] == temperature_of(tmp_path / "run" / "best")
    )
