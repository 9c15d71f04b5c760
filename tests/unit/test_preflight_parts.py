"""Parts of the preflight on synthetic rows: copies, conflicts, lengths, labels, floors, costs, counts."""

import contextlib
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from ft.config import Config
from ft.data.plan import Plan, evaluation_batches
from ft.preflight.costs import batch_costs, fit, spread, update_costs
from ft.preflight.duplicates import exact_copies, label_conflicts
from ft.preflight.findings import Findings
from ft.preflight.floors import floors
from ft.preflight.forecast import forecast, room_on_disk, times_due
from ft.preflight.labels import label_facts
from ft.preflight.lengths import token_lengths
from ft.preflight.memory import free_host_bytes, is_out_of_memory, limited_to, peak_host_bytes
from ft.preflight.near import jaccard, near_copies, sample_note, shingles_of
from ft.preflight.probe import Measured
from ft.preflight.rows import Rows, different_texts


def rows(texts, labels=None, first=0, tokens=None):
    return Rows(
        pa.chunked_array([texts], pa.large_string()),
        np.arange(first, first + len(texts)),
        None if labels is None else np.array(labels),
        None if tokens is None else np.array(tokens),
    )


SENTENCE = "the quick brown fox jumps over the lazy dog and runs far away into the dark forest"
SPLITS = {
    "train": rows([SENTENCE, "one", "one", "two", "one"], [0, 0, 1, 1, 0]),
    "validation": rows(["two", "three"], [0, 1]),
    "test": rows([SENTENCE.upper(), "one", "three"], [0, 0, 1], first=100),
}


def test_exact_copies_are_counted_within_and_across_splits_with_the_rows_that_they_repeat():
    found = exact_copies(different_texts(SPLITS), SPLITS)
    assert found["within"]["train"] == {"rows": 2, "first": [[2, 1], [4, 1]]}
    assert found["within"]["validation"]["rows"] == found["within"]["test"]["rows"] == 0
    assert found["all"] == 5  # of ten rows; five distinct texts
    assert found["across"] == {
        "validation in train": {"rows": 1, "first": [[0, 3]]},
        "test in train": {"rows": 1, "first": [[101, 1]]},  # the capitals are another text
        "test in validation": {"rows": 1, "first": [[102, 1]]},
    }


def test_a_text_under_different_labels_is_found_in_one_split_and_across_splits():
    found = label_conflicts(different_texts(SPLITS), SPLITS, lambda label: "ab"[label])
    assert (found["texts"], found["rows"]) == (2, 6)
    where = {
        text["text"]: [(r["split"], r["row"], r["label"]) for r in text["rows"]] for text in found["first"]
    }
    assert where["two"] == [("train", 3, "b"), ("validation", 0, "a")]
    assert where["one"] == [("train", 1, "a"), ("train", 2, "b"), ("train", 4, "a"), ("test", 101, "a")]


def test_rows_of_several_labels_conflict_when_any_of_them_differs():
    split = {"train": rows(["a", "a", "b", "b"], [[1, 0], [1, 1], [0, 1], [0, 1]])}
    assert label_conflicts(different_texts(split), split)["texts"] == 1


def test_near_copies_are_those_whose_shingles_are_mostly_the_same():
    texts = [SENTENCE, SENTENCE.replace("lazy", "idle"), SENTENCE + "!", SENTENCE, "something else entirely"]
    split = {"train": rows(texts), "test": rows(["  " + SENTENCE.upper(), "nothing like it at all here"])}
    found = near_copies(different_texts(split), split)
    assert found["within"]["train"]["rows"] == 4 and found["within"]["test"]["rows"] == 0
    assert [row for row, _ in found["within"]["train"]["first"]] == [0, 1, 2, 3]
    assert found["across"]["test in train"]["rows"] == 1
    assert found["compared"] == found["texts"] == 6


@pytest.mark.parametrize(
    "one, other, similarity",
    [
        ("yes", "yep", 0),  # shorter than a shingle: a single one
        ("x", "y", 0),
        ("AB-12", "ab-12", 1),
        ("AB-12", "AB-13", 0),
        ("abcdefgh", "abcdefgi", 3 / 5),
        ("room 101", "room  102", 3 / 5),
        ("𝄞aaaab", "𝄞aaaac", 1 / 3),
    ],
)
def test_every_character_of_a_shingle_counts(one, other, similarity):
    assert jaccard(shingles_of(one), shingles_of(other)) == pytest.approx(similarity)


def test_an_exact_copy_is_no_near_copy():
    split = {"train": rows([SENTENCE, SENTENCE]), "test": rows([SENTENCE])}
    found = near_copies(different_texts(split), split)
    assert found["within"]["train"]["rows"] == found["across"]["test in train"]["rows"] == 0


def test_minhash_finds_the_rows_that_comparing_all_pairs_finds():
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(300)]
    texts = [" ".join(generator.choice(words, 12)) for _ in range(100)]
    for text in texts[:60]:  # with one or two words changed
        changed = text.split()
        for place in generator.choice(12, generator.integers(1, 3), replace=False):
            changed[place] = str(generator.choice(words))
        texts.append(" ".join(changed))
    split = {"train": rows(texts)}
    sets = [shingles_of(text) for text in texts]
    close = [any(i != j and jaccard(a, b) >= 0.7 for j, b in enumerate(sets)) for i, a in enumerate(sets)]
    assert 40 < sum(close) < 120
    found = near_copies(different_texts(split), split)["within"]["train"]["rows"]
    assert 0.97 * sum(close) <= found <= sum(close)


def test_of_too_many_texts_a_sample_is_compared_and_its_size_said():
    split = {"train": rows([f"text number {i}" for i in range(50)]), "test": rows(["a", "b"])}
    found = near_copies(different_texts(split), split, most=20)
    assert (found["texts"], found["compared"]) == (52, 20)
    assert sample_note(found) == "counted in a sample of 20 of the 52 different texts"
    assert sample_note(near_copies(different_texts(split), split, most=52)) == ""


def test_texts_that_share_a_disclaimer_are_compared_with_few_and_copies_among_them_found(monkeypatch):
    generator = np.random.default_rng(0)
    disclaimer = "this message is meant for its reader alone and must not be handed on to anybody else "
    own = ["".join(generator.choice(list("abcdefghij "), 40)) for _ in range(600)]
    texts = [disclaimer + text for text in own]
    texts += [text[:-1] + "#" for text in texts[:50]]
    split = {"train": rows(texts)}
    compared = []
    counting = lambda one, other: compared.append(1) or jaccard(one, other)  # noqa: E731
    monkeypatch.setattr("ft.preflight.near.jaccard", counting)
    monkeypatch.setattr("ft.preflight.near.MOST_SHARED", 5)
    monkeypatch.setattr("ft.preflight.near.MOST_COMPARED", 10)
    monkeypatch.setattr("ft.preflight.near.BLOCK", 200)  # copies are in the last block, or in the others
    found = near_copies(different_texts(split), split)["within"]["train"]["rows"]
    assert 95 <= found <= 100 and len(compared) <= 4 * 10 * len(texts)


def test_the_length_that_keeps_99_percent_and_the_share_that_is_cut():
    tokens = list(range(1, 201))
    found = token_lengths({"train": rows(["x"] * 200, tokens=tokens)}, max_length=150)
    assert found["keeps_99_percent"] == 198
    assert found["splits"]["train"]["cut_rows"] == 50 and found["splits"]["train"]["cut_share"] == 0.25
    assert found["splits"]["train"]["longest"] == 200


def test_labels_are_counted_and_those_that_a_split_lacks_are_named():
    findings = Findings()
    splits = {"train": rows(["x"] * 30, [0] * 20 + [1] * 9 + [2]), "validation": rows(["y"] * 2, [0, 1])}
    found = label_facts("single_label_classification", ["a", "b", "c", "d"], splits, findings)
    assert found["counts"]["train"] == {"a": 20, "b": 9, "c": 1, "d": 0}
    assert found["lacking"] == {"train": [], "validation": ["c"]}
    said = " ".join(findings.messages("warning"))
    assert "validation: no row has the label 'c'" in said and "the labels 'b', 'c'" in said
    assert "no row of any split has the label 'd'" in said


def test_several_labels_a_row_are_counted_one_by_one():
    split = {"train": rows(["x"] * 3, [[1, 1], [0, 1], [0, 0]])}
    found = label_facts("multi_label_classification", ["a", "b"], split, Findings())
    assert found["counts"]["train"] == {"a": 1, "b": 2} and found["without_labels"] == {"train": 1}


def test_numbers_are_described_by_their_spread():
    found = label_facts("regression", [], {"train": rows(["x"] * 3, [1.0, 2.0, 6.0])}, Findings())
    assert found["targets"]["train"]["mean"] == 3.0 and found["targets"]["train"]["median"] == 2.0


WORDS = ["good great fine", "bad awful poor"]
TEXTS = [f"{WORDS[i % 2]} thing {i % 7}" for i in range(60)] + ["bad day"] * 20
CLASSES = np.array([i % 2 for i in range(60)] + [1] * 20)


def test_floors_of_classes_are_the_majority_and_a_linear_model():
    found = floors("single_label_classification", ["a", "b"], (TEXTS, CLASSES), (TEXTS[:60], CLASSES[:60]))
    assert found["prior"]["accuracy"] == 0.5  # the majority of training, on rows that are half and half
    assert found["tf_idf"]["accuracy"] == 1.0
    assert (found["fitted_on_rows"], found["scored_rows"]) == (80, 60)


def test_floors_of_many_classes_are_fitted_on_fewer_rows(monkeypatch):
    monkeypatch.setattr("ft.preflight.floors.MOST_WEIGHTS", 100)
    monkeypatch.setattr("ft.preflight.floors.LEAST_ROWS", 10)
    found = floors("single_label_classification", ["a", "b"], (TEXTS, CLASSES), (TEXTS[:60], CLASSES[:60]))
    assert (found["fitted_on_rows"], found["scored_rows"]) == (50, 60)
    found = floors("single_label_classification", list("abcdefghijkl"), (TEXTS, CLASSES), (TEXTS, CLASSES))
    assert found["fitted_on_rows"] == 10


def test_floors_of_several_labels_are_their_shares_and_one_linear_model_each():
    labels = np.stack([CLASSES, np.ones_like(CLASSES)], axis=1)
    found = floors("multi_label_classification", ["a", "b"], (TEXTS, labels), (TEXTS[:60], labels[:60]))
    assert found["tf_idf"]["f1_micro"] == 1.0 > found["prior"]["f1_micro"]


def test_a_single_label_that_a_row_has_or_has_not_has_floors():
    labels = CLASSES[:, None]
    found = floors("multi_label_classification", ["spam"], (TEXTS, labels), (TEXTS[:60], labels[:60]))
    assert found["tf_idf"]["f1_micro"] == 1.0 > found["prior"]["f1_micro"]


def test_floors_of_numbers_are_the_mean_and_ridge_regression():
    found = floors("regression", [], (TEXTS, CLASSES * 10.0), (TEXTS[:60], CLASSES[:60] * 10.0))
    assert found["prior"]["mse"] == pytest.approx(25 + 1.25**2) and found["prior"]["pearsonr"] is None
    assert found["tf_idf"]["mse"] < 1 and found["tf_idf"]["pearsonr"] > 0.95


def test_texts_without_words_have_a_floor_by_characters():
    texts, labels = ["??", "!!"] * 20, np.array([0, 1] * 20)
    found = floors("single_label_classification", ["a", "b"], (texts, labels), (texts, labels))
    assert found["tf_idf"]["accuracy"] == 1.0


def test_the_costs_of_an_update_are_those_of_its_slowest_process():
    lengths = np.array([2, 4, 6, 8, 3, 5])
    plan = Plan(np.array([0, 1, 2, 3, 4, 5]), 4)  # an update of four rows, and a short one of two
    # Two processes: rows of lengths 2 and 8, and 4 and 6; then 5, and 3.
    costs, largest = update_costs(lengths, plan, 2, 4)
    assert costs.tolist() == [[1, 16, 128], [1, 5, 25]] and largest.tolist() == [128, 25]
    # In one-row micro-batches: lengths 2 and 8; then 5.
    costs, largest = update_costs(lengths, plan, 2, 1)
    assert costs.tolist() == [[2, 10, 68], [1, 5, 25]] and largest.tolist() == [64, 25]
    batches = evaluation_batches(lengths, 2)  # 8 and 6, 5 and 4, 3 and 2
    assert batch_costs(batches, lengths, 2).tolist() == [[1, 16, 128], [1, 6, 18]]


def test_the_fit_finds_the_prices_and_gives_none_below_zero():
    generator = np.random.default_rng(0)
    tokens = generator.integers(100, 1000, 20).astype(float)
    costs = np.stack([np.ones(20), tokens, tokens * tokens / 32], axis=1)
    prices = np.array([0.01, 2e-4, 3e-7])
    assert fit(costs, costs @ prices) == pytest.approx(prices, rel=1e-6)
    falling = fit(costs, 1 - tokens / 2000)
    assert (falling >= 0).all() and falling[0] > 0
    assert costs[spread(costs, 5), 1].tolist() == sorted(costs[spread(costs, 5), 1])
    assert costs[spread(costs, 5), 1][[0, -1]].tolist() == [tokens.min(), tokens.max()]


@pytest.mark.parametrize("done", [0, 3, 7, 10])
@pytest.mark.parametrize(
    ("strategy", "every", "total"), [("steps", 4, 10), ("steps", 5, 10), ("epoch", 9, 7)]
)
def test_evaluations_and_saves_are_counted_as_the_run_makes_them(strategy, every, total, done):
    per_epoch = 3
    period = per_epoch if strategy == "epoch" else every
    made = sum(step % period == 0 or step == total for step in range(done + 1, total + 1))
    assert times_due(strategy, every, total, per_epoch, done) == made
    assert times_due("no", every, total, per_epoch, done) == 0


def test_what_the_first_evaluation_alone_costs_is_forecast_once():
    measured = Measured(
        first_evaluation_rest=5.0, evaluation_rest=0.5, peak_host=[1.0], peak_device=[0.0],
        update_costs=[np.ones(3)], update_seconds=[1.0], planned_rounds={"validation": np.ones(3)},
    )  # fmt: skip
    config = Config(eval_strategy="epoch", save_strategy="no")
    found = forecast(config, measured, total=30, per_epoch=3, done=0, start=2.0)
    assert found["evaluations"] == 10 and found["seconds"]["evaluations"] == pytest.approx(5 + 9 * 0.5)
    assert found["total_seconds"] == pytest.approx(2 + 5 + 9 * 0.5)


def test_what_the_first_update_alone_costs_is_forecast_once():
    """Such as compiling the layers."""
    measured = Measured(
        planned=np.array([10.0, 0, 0]), update_costs=[np.array([1.0, 0, 0])], update_seconds=[2.0],
        longest={"seconds": 60.0}, longest_cost=np.array([3.0, 0, 0]), peak_host=[1.0], peak_device=[0.0],
    )  # fmt: skip
    config = Config(eval_strategy="no", save_strategy="no")
    seconds = forecast(config, measured, total=10, per_epoch=10, done=0, start=5.0)["seconds"]
    assert seconds["start"] == pytest.approx(5 + 60 - 6) and seconds["updates"] == pytest.approx(20)


def test_what_a_run_replaces_is_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    for name, size in {"best": 1, "final": 2, "checkpoints/step-00000001": 4}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    of = {"output_dir": str(tmp_path), "overwrite_output_dir": True}
    assert room_on_disk(Config(**of)) == 1007
    assert room_on_disk(Config(**of, resume_from_checkpoint="latest")) == 1003
    assert room_on_disk(Config(**of, num_seeds=2)) == 1000


def test_checkpoints_that_stand_are_replaced_once_another_is_written():
    measured = Measured(checkpoint_bytes=100, export_bytes=10, peak_host=[1.0], peak_device=[0.0])
    measured.update_costs, measured.update_seconds = [np.ones(3)], [1.0]

    def needed(standing, **options):
        config = Config(eval_strategy="no", save_strategy="steps", save_steps=10, **options)
        done = 10 * standing
        return forecast(config, measured, 100, 100, done, 0.0, standing)["disk_bytes"] - 30

    assert [needed(standing) for standing in (0, 2, 4, 9)] == [400, 200, 100, 100]
    assert needed(2, save_total_limit=None) == 800


def test_a_checkpoint_that_is_written_slower_than_they_come_is_waited_for_and_held_beside_updates():
    measured = Measured(
        peak_host=[700.0], peak_device=[0.0], before_saving=600, checkpoint_bytes=300, save=0.5, write=25.0,
        planned=np.array([100.0, 0, 0]), update_costs=[np.array([1.0, 0, 0])], update_seconds=[1.0],
    )  # fmt: skip
    config = Config(eval_strategy="no", save_strategy="steps", save_steps=10)
    found = forecast(config, measured, total=100, per_epoch=100, done=0, start=0.0)
    assert found["saves"] == 10 and found["seconds"]["saves"] == pytest.approx(10 * 0.5 + 9 * (25 - 10))
    assert found["peak_memory_bytes"] == 900
    once = Config(eval_strategy="no", save_strategy="steps", save_steps=100)
    assert forecast(once, measured, total=100, per_epoch=100, done=0, start=0.0)["peak_memory_bytes"] == 700


def test_allocating_more_than_is_free_is_an_error_and_not_the_end_of_the_process():
    import torch

    with pytest.raises(Exception) as raised, limited_to(50 * 2**20):
        torch.ones(2**28)
    assert is_out_of_memory(raised.value)
    assert torch.ones(2**26).sum() > 0  # the limit is gone
    assert 0 < peak_host_bytes() and 0 < free_host_bytes()
    assert not is_out_of_memory(ValueError("no such row"))


def tells_parts():
    with contextlib.suppress(OSError):
        return "Pss_Shmem" in Path("/proc/self/smaps_rollup").read_text()
    return False


@pytest.mark.skipif(not tells_parts(), reason="this system does not tell the parts of shared memory")
def test_of_memory_that_two_processes_share_each_has_its_part():
    """Memory of gradients, all of which both use (`ft.shared_gradients`)."""
    size, (told, tell), (ended, end) = 2**26, os.pipe(), os.pipe()
    memory = mmap.mmap(-1, size)
    memory[::4096] = bytes(size // 4096)
    alone = peak_host_bytes()
    child = os.fork()
    if not child:
        try:
            os.close(end)
            memory[::4096] = bytes(size // 4096)
            os.write(tell, b".")
            os.read(ended, 1)
        finally:
            os._exit(0)
    os.close(tell)
    assert os.read(told, 1)
    together = peak_host_bytes()
    os.close(end)
    os.waitpid(child, 0)
    os.close(told)
    os.close(ended)
    assert alone - together == pytest.approx(size / 2, rel=0.1)


@pytest.mark.parametrize(
    "limit, used, inactive",
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
@pytest.mark.parametrize("group", ["/", "/slurm/job_7/step_0"])
def test_files_that_a_container_has_read_count_as_free_memory(
    tmp_path, monkeypatch, limit, used, inactive, group
):
    """In a container, or a job whose limit is above the process's own group."""
    monkeypatch.setattr("ft.preflight.memory.CGROUP", tmp_path)
    monkeypatch.setattr("ft.preflight.memory.GROUPS", tmp_path / "groups")
    (tmp_path / "groups").write_text(f"4:cpu:/x\n0::{group}\n5:hugetlb,memory:{group}\n")
    if group != "/":
        limit, used = (
            "/".join([*path.split("/")[:-1], "slurm/job_7", path.split("/")[-1]]) for path in (limit, used)
        )
        (tmp_path / limit).parent.parent.mkdir(parents=True)
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("5000\n")
    (tmp_path / used).write_text("4000\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon 900\n{inactive} 3000\nslab 100\n")
    assert free_host_bytes() == 4000
    (tmp_path / limit).with_name("memory.stat").unlink()
    assert free_host_bytes() == 1000
