"""Real tokens per second of train.py and of other loops, on the same texts and machine."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ALL_ROWS,
    Killed,
    add_data_options,
    at_least,
    check_updates,
    class_file,
    column_flags,
    device,
    draw_rows,
    gemm_peak,
    in_turn,
    logged_steps,
    median,
    median_and_spread,
    model_folder,
    peak_shares,
    peer,
    planned_lengths,
    rates,
    read_csv,
    save,
    say,
    spread,
    table,
    text_lengths,
    train_py,
    write_csv,
)

GLOBAL_BATCH = 32
LEARNING_RATE = 5e-5
ARMS = {
    "ours": "train.py",
    "ours_two": "train.py, two processes of half the threads each",
    "trainer": "Trainer, grouped by length, fused AdamW",
    "trainer_defaults": "Trainer at its defaults",
    "plain": "Accelerate loop, padding to the longest row",
    "tutorial": "tutorial: padding to the tokenizer's limit",
}
SAME_ROWS = (
    "In a round, all arms train two epochs of the same rows, drawn anew for each round; the second counts. "
    "The Trainer groups them, and train.py trains as many word embeddings, as in an epoch of all rows. The "
    "first round begins with the first arm, the next with the second, and so on."
)
# All texts, which train.py gets as validation rows and never scores: it trains the word embeddings of their
# tokens, as in an epoch of all rows.
OTHERS = "validation.csv"
QUICK = {"updates": 8, "rounds": 1, "arms": ["ours", "trainer", "plain"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument(
        "--max_length", type=int, default=128, help="longest text in tokens, except for tutorial"
    )
    add_updates_option(parser, 20)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))


def add_updates_option(parser: argparse.ArgumentParser, default: int) -> None:
    """--updates."""
    parser.add_argument(
        "--updates",
        type=at_least(1),
        default=default,
        help="updates that count; a run makes as many before them",
    )


def run(options: argparse.Namespace) -> None:
    """Every arm, round by round."""
    measure(options, speeds)


def measure(options: argparse.Namespace, text: Callable[..., str]) -> None:
    """The same, with the `text` of a command, made from the options, the measurements, and the peaks."""
    if "ours_two" in options.arms and device().type != "cpu":
        say("ours_two is left out: it is for a machine without a GPU")
        options.arms = [arm for arm in options.arms if arm != "ours_two"] or sys.exit(
            "error: --arms: none left"
        )
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    gemm, left_out = [gemm_peak()], ""
    for number in range(options.rounds):
        for arm, found in one_round(options, number):
            if found is None:
                del measured[arm]
                left_out += f"\n\nKilled, apparently for lack of memory, and left out: {ARMS[arm]}."
                options.arms = list(measured) or sys.exit("error: no arm is left")
                continue
            measured[arm].append(rates(found["steps"]) | {"peak_bytes": found["peak_bytes"]})
            say(f"round {number + 1}, {arm}: {measured[arm][-1]['tokens_per_second']:,.0f} tokens/s")
        gemm.append(gemm_peak())
        save(options, text(options, measured, gemm) + left_out, measured, gemm)


def one_round(options: argparse.Namespace, number: int) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every arm in turn, each in a fresh process, over two epochs of the same rows: the updates of the second
    as "steps", and "peak_bytes"; None for a process that was killed. Each round, counted from 0, has its own
    seed and rows."""
    train, seed = class_file(options.data, "train"), 42 + number
    in_all = len(read_csv(train)[1])
    check_updates(options.updates, in_all, GLOBAL_BATCH, options.data)
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_rows(train, options.updates * GLOBAL_BATCH, seed, Path(folder))
        texts, labels = read_csv(train)[0], read_csv(drawn)[1]
        write_csv(drawn.with_name(OTHERS), texts, labels[:1] * len(texts))
        for arm in in_turn(options.arms, number):
            try:
                found = _measure(options, arm, drawn, in_all, seed)
            except Killed as killed:
                say(str(killed))
                yield arm, None
                continue
            yield arm, found | {"steps": found["steps"][options.updates :]}


def _measure(
    options: argparse.Namespace, arm: str, train: Path, rows_of_epoch: int, seed: int
) -> dict[str, Any]:
    if arm in ("ours", "ours_two"):
        return _ours(options, train, seed, processes=2 if arm == "ours_two" else 1)
    shared = {
        "model": model_folder(options.model), "train": train, "updates": 2 * options.updates, "seed": seed,
        "learning_rate": LEARNING_RATE,
    }  # fmt: skip
    if arm == "tutorial":
        rows = options.updates * GLOBAL_BATCH
        return peer(arm, batch=GLOBAL_BATCH, epochs=2, rows=rows, padding="max_length", **shared)
    name, _, defaults = arm.partition("_")
    if name == "trainer":
        shared |= {"defaults": bool(defaults), "rows_of_epoch": rows_of_epoch}
    return peer(name, max_length=options.max_length, batch=GLOBAL_BATCH, **shared)


def _ours(options: argparse.Namespace, train: Path, seed: int, processes: int) -> dict[str, Any]:
    flags = {
        "model_name_or_path": options.model, "train_file": train, "validation_file": train.with_name(OTHERS),
        "max_length": options.max_length, "global_batch_size": GLOBAL_BATCH, "learning_rate": LEARNING_RATE,
        "num_train_epochs": 2, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no",
        "seed": seed, "overwrite_cache": "true",  # each run encodes, like the others
        **column_flags(train), **ALL_ROWS,
    }  # fmt: skip
    found = train_py(flags, options.extra, processes)
    steps = logged_steps(found["rows"], GLOBAL_BATCH)
    if len(steps) != 2 * options.updates:
        raise SystemExit(
            f"error: train.py made {len(steps)} updates, expected {2 * options.updates}; see what follows --"
        )
    # The plan of the same updates, for the squares. Its tokens must be those that train.py has counted.
    known = text_lengths(options.model, train, options.max_length)
    planned = planned_lengths(known, GLOBAL_BATCH, seed)
    for update, (step, lengths) in enumerate(zip(steps, planned, strict=False)):
        if step["tokens"] != lengths.sum():
            raise SystemExit(
                f"error: update {update}: {step['tokens']} tokens logged, {lengths.sum()} planned"
            )
        step["squares"] = int((lengths**2).sum())
    return {"steps": steps, "peak_bytes": found["peak_bytes"]}


def speeds(
    options: argparse.Namespace, measured: dict[str, list[dict[str, float]]], gemm: list[float]
) -> str:
    """The table of all arms, and an explanation of its columns."""
    rows = []
    for arm, runs in measured.items():
        real = [one["tokens_per_second"] for one in runs]
        ratios = [
            ours["tokens_per_second"] / theirs["tokens_per_second"]
            for ours, theirs in zip(measured.get("ours", []), runs, strict=False)
        ]
        percent = peak_shares(options.model, runs, gemm)
        rows.append(
            [
                ARMS[arm],
                f"{median(real):,.0f}",
                spread(real, 0),
                f"{median([one['examples_per_second'] for one in runs]):.1f}",
                f"{median([one['padding'] for one in runs]):.1%}",
                median_and_spread(percent, 1),
                median_and_spread([one["peak_bytes"] / 1e6 for one in runs], 0),
                median_and_spread(ratios, 2) if arm != "ours" else "",
            ]
        )
    waited = [one["waited"] / one["seconds"] for one in measured.get("ours", [])]
    waits = f" Making its batches takes {median(waited):.2%} of the time of train.py." if waited else ""
    header = ["", "real tokens/s, median", "min to max", "examples/s", "padding", "% of the GEMM peak"]
    header += ["peak memory, MB", "ours / this one"]
    return (
        f"{table(header, rows)}\n\n"
        f"fp32, {options.updates} updates an epoch, a fresh process a run; rounds done: "
        f"{len(next(reversed(measured.values())))}. Batch {GLOBAL_BATCH}. "
        f"{SAME_ROWS} Medians of the rounds, and in brackets the lowest and highest of them; the last column "
        "is of the ratios of each round. The share of the GEMM peak is the model FLOP utilisation, see "
        "`model_flops` in common.py; the peak of a round is the higher of the samples before and after "
        f"it.{waits}"
    )
