"""Peak memory of a training process: train.py and other loops, on the same rows."""

import argparse

from benchmarks.common import (
    add_data_options,
    at_least,
    median,
    median_and_spread,
    spread,
    table,
)
from benchmarks.throughput import ARMS, add_updates_option, measure, speeds

QUICK = {"updates": 4, "rounds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument("--max_length", type=int, default=256, help="longest text in tokens")
    add_updates_option(parser, 15)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm != "tutorial"])


def run(options: argparse.Namespace) -> None:
    """Every arm, round by round."""
    measure(options, _text)


def _text(options: argparse.Namespace, measured: dict[str, list[dict[str, float]]], gemm: list[float]) -> str:
    weighed = {arm: [one["peak_bytes"] / 1e6 for one in runs] for arm, runs in measured.items()}
    rows = []
    for arm, peaks in weighed.items():
        ratios = [ours / theirs for ours, theirs in zip(weighed.get("ours", []), peaks, strict=False)]
        ratio = median_and_spread(ratios, 2) if arm != "ours" else ""
        rows.append([ARMS[arm], f"{median(peaks):,.0f}", spread(peaks, 0), ratio])
    return (
        f"{table(['', 'MB, median', 'min to max', 'ours / this one'], rows)}\n\n"
        "The most memory that the process held at any time (ru_maxrss; of several, the one that held most), "
        "libraries and encoding included. The same runs by their speed:\n\n"
        f"{speeds(options, measured, gemm)}"
    )
