"""Compares two runs, quantity by quantity."""

import json
from pathlib import Path

import torch
from conftest import metrics_of
from safetensors.torch import load_file

from ft.verify import weights_difference

# A bias of attention's keys adds the same to all scores of a query, and so changes nothing: its gradient is
# only rounding, which Adam turns into steps of the full rate.
KEYS_BIAS = "key.bias"


def largest_difference(one: Path, other: Path) -> dict[str, float]:
    """The largest relative difference of each quantity over all updates and evaluations, and of the weights
    that have a gradient."""
    rows, others = metrics_of(one), metrics_of(other)
    assert [r["step"] for r in rows] == [r["step"] for r in others]
    assert [set(r) for r in rows] == [set(r) for r in others]
    worst: dict[str, float] = {}
    for a, b in zip(rows, others, strict=True):
        for key, value in a.items():
            if key.startswith("perf/"):
                continue
            assert (value is None) == (b[key] is None), (a["step"], key)
            if value is not None:
                worst[key] = max(worst.get(key, 0.0), abs(value - b[key]) / max(abs(value), 1e-12))
    worst["weights"] = weights_difference(one / "final", other / "final", but=KEYS_BIAS)
    return worst


# Sums of floating-point numbers in a different order.
ROUNDED = ("train/", "weights", "eval/loss", "eval/mse", "eval/mae", "eval/r2", "eval/pearsonr")
# Rows with nearly the same score may swap ranks, each worth 7.5e-4 of the reviews' area.
RANKED = ("eval/auroc", "eval/spearmanr")


def assert_same(one: Path, other: Path, weights: float = 1e-5) -> None:
    """Two runs of one config are the same up to rounding; `weights` is how much of it they may accumulate."""
    for key, difference in largest_difference(one, other).items():
        allowed = 1e-5 if key.startswith(ROUNDED) else 4e-3 if key in RANKED else 0
        assert difference <= (weights if key == "weights" else allowed), (other, key, difference)


def without_timing(output_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl without timings."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in metrics_of(output_dir)]


def results_in(output_dir: Path) -> dict:
    """results.json without what a clock decides."""
    found = json.loads((output_dir / "results.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("perf/")}


def same_bits(one: Path, other: Path) -> bool:
    """Whether two exported models have the same weights, bit for bit."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
