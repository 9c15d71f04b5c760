"""`eval.py --compare RUN_A RUN_B`: how much two runs differ on the same rows, and how certain that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ft.analysis.comparison import differences, right_in_one
from ft.cli import parse
from ft.config import EvalConfig
from ft.data.sources import Source, choose_split, find_sources, fingerprints
from ft.errors import EXIT_DONE, UserError, printable
from ft.hosts import HostGroup
from ft.output import check_place, seed_folders, write_whole
from ft.pretrained import of_training
from ft.runtime import build_accelerator
from ft.scored import MULTI, NUMBER, SINGLE, Scored, check_same
from ft.tracking import to_json
from ft.unseen import has_set_test_aside
from ft.values import aligned, precision_name, short

SHOWN = {
    SINGLE: ("accuracy", "f1_macro", "matthews_correlation", "auroc"),
    MULTI: ("f1_micro", "f1_macro", "f1_samples", "subset_accuracy"),
    NUMBER: ("mse", "mae", "r2", "pearsonr", "spearmanr"),
}
MOST_ROWS = 100  # of those that only one side gets right, in comparison.json
FORMATS = ("jsonl", "csv", "parquet")
PREDICTIONS = "predictions.jsonl"
LENGTH = ("num_train_epochs", "max_train_steps")  # the same for all seeds, unless some are not retrained yet
OURS = "compared"  # prefix of a folder for scores, if that of the run's evaluation has others


def compare(config: EvalConfig, score: Callable[[EvalConfig, dict[str, Source]], int]) -> int:
    """Write comparison.json to output_dir and print the table; returns the exit code.

    A run that was trained but not yet evaluated is scored first, by `score`. Raises `UserError` if the two
    did not score the same rows for the same task."""
    accelerator = build_accelerator(config)
    hosts = HostGroup(accelerator)
    hosts.from_main(lambda: check_place(Path(config.output_dir)))
    names = config.compared
    runs: list[list[Path]] = hosts.from_main(lambda: [runs_in(Path(name)) for name in names])
    hosts.from_main(lambda: check_models([run for side in runs for run in side]))
    sides = []
    for side in runs:
        folders = []
        for run in side:
            place, missing = hosts.from_main(partial(find_predictions, run, config.split))
            if missing is not None:
                of_run = _scoring(run, missing, place if place.name.startswith(OURS) else run)
                score(of_run, _sources(of_run))
            folders.append(place)
        sides.append(folders)
    if accelerator.is_main_process:
        scored = [[Scored.read(folder / PREDICTIONS) for folder in folders] for folders in sides]
        found = compared(scored, names)
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        is_there = (folder / "comparison.json").exists()
        write_whole(folder / "comparison.json", to_json(found, indent=1, ensure_ascii=False) + "\n")
        print(printable(table(found)))
        for line in _precision_notes(sides):
            print(f"note: {line}")
        print(f"written to {folder}: comparison.json{', in the place of an earlier one' if is_there else ''}")
    return EXIT_DONE


def _precision_notes(sides: Sequence[Sequence[Path]]) -> list[str]:
    """Notes for the user if evaluations were made in different precisions; older ones do not record it."""
    found = [_results(folder).get("mixed_precision") for folders in sides for folder in folders]
    known = sorted({precision_name(name) for name in found if name})
    if len(known) < 2:
        return []
    return [
        f"WARNING mixed precision: the predictions were made in {', '.join(known)}, which is part of the "
        "differences; score all runs in one with eval.py"
    ]


# --- which predictions


def runs_in(folder: Path) -> list[Path]:
    """The runs that a folder holds: itself, or those of several seeds."""
    if not folder.is_dir():
        raise UserError(f"compare: {str(folder)!r} is not a folder; expected that of an evaluation or run.")
    seeds = seed_folders(folder)
    if not seeds and not (folder / "metrics.jsonl").exists():  # each trained by a command of its own
        seeds = [path for path in folder.glob("seed-*") if path.name[5:].isdecimal()]
    runs = sorted(seeds, key=lambda path: int(path.name[5:]))
    places = [(run, path) for run in runs if (path := run / "config.yaml").exists()]
    configs = [(run, yaml.safe_load(path.read_text("utf-8"))) for run, path in places]
    for (first, known), (run, config) in pairwise(configs):
        for name in (name for name in LENGTH if config.get(name) != known.get(name)):
            raise UserError(
                f"compare: {name} is {known.get(name)!r} in {str(first)!r}, and {config.get(name)!r} in "
                f"{run.name}; resume the seeds with --num_seeds and --resume_from_checkpoint latest."
            )
    return runs or [folder]


def check_models(runs: Sequence[Path]) -> None:
    """Raise `UserError` if the models of the runs were trained for different tasks, before any of them is
    scored."""
    models = [model for model in (Scored.by_model(run / "best") for run in runs) if model is not None]
    for other in models[1:]:
        check_same(models[0], other)


def find_predictions(run: Path, split: str | None) -> tuple[Path, str | None]:
    """The folder that has (or will have) the predictions of a run, and the split to score first, None if they
    exist already."""
    if (run / PREDICTIONS).exists() and not (run / "metrics.jsonl").exists():  # which a training run has
        found = _results(run).get("split", split)
        if (newest := _newest(run)) != PREDICTIONS:
            raise UserError(
                f"compare: {str(run)!r} was evaluated again since {PREDICTIONS} was written, with {newest}: "
                "evaluate with --predictions_format jsonl."
            )
        if split not in (None, found):
            raise UserError(
                f"compare: {str(run)!r} holds the predictions of the {found} split, not those of {split}; "
                "name the run itself, or leave split out."
            )
        return run, None
    if not (run / "config.yaml").exists() or not (run / "best" / "config.json").exists():
        hint = "expected the folder of an evaluation or of a run."
        for other in run.glob("predictions.*"):
            hint = f"found {other.name}: evaluate with --predictions_format jsonl."
        raise UserError(
            f"compare: {str(run)!r} holds neither {PREDICTIONS} nor a finished run (config.yaml and best/); "
            + hint
        )
    results = _results(run)
    if not results:
        raise UserError(
            f"compare: {str(run)!r} is not finished; resume it with --resume_from_checkpoint latest."
        )
    if split is None:  # what the run has scored: its test split may have no labels, its data may be gone
        scored = {"test": "test/loss" in results, "validation": "eval/loss" in results}
        split = next((name for name, is_scored in scored.items() if is_scored), None)
    if split is None:
        config = _scoring(run)
        split = choose_split(config, _sources(config))
    places, config = [run / f"{name}-{split}" for name in ("evaluation", OURS)], _scoring(run, split)
    for place in places:
        if _is_its_own(place, run, config):
            return place, None
    # An evaluation of other texts or with other options in the first place is not replaced.
    is_other = _results(places[0]).get("options") not in _marks(config)
    return places[is_other and any(places[0].glob("predictions.*"))], split


def _is_its_own(place: Path, run: Path, config: EvalConfig) -> bool:
    """Whether a folder has the predictions of a run's best model, by the options and data of `config`."""
    there = place / PREDICTIONS
    if not there.exists() or there.stat().st_mtime < (run / "best" / "config.json").stat().st_mtime:
        return False
    known = _results(place)
    is_its_own = known.get("options") in _marks(config) and _newest(place) == PREDICTIONS
    return is_its_own and _data(config) in (None, known.get("sources"))


def _marks(config: EvalConfig) -> set[str]:
    """The marks of an evaluation in the precision of this launch, or in that of the run."""
    return {config.mark(), config.mark(of_training(config).get("mixed_precision"))}


def _newest(folder: Path) -> str:
    """The predictions that were written last, in any format: those in results.json or, if nothing was scored
    with them, the latest."""
    files = [path for kind in FORMATS if (path := folder / f"predictions.{kind}").exists()]
    return _results(folder).get("predictions") or max(files, key=lambda path: path.stat().st_mtime_ns).name


def _data(config: EvalConfig) -> dict[str, str] | None:
    """The fingerprints of the data that an evaluation would read; None if it is gone."""
    try:
        return fingerprints(_sources(config))
    except UserError:
        return None


def _results(folder: Path) -> dict[str, Any]:
    """The results.json of an evaluation; empty if there is none."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _scoring(run: Path, split: str | None = None, place: Path | None = None) -> EvalConfig:
    """The evaluation of a run's best model, on the data of its own config."""
    words = {"model_name_or_path": run / "best", "output_dir": place or run, "split": split or "null"}
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    config = parse(EvalConfig, [str(run / "config.yaml"), *flags])
    if _has_drawn_test_rows(config):
        config.test_file = None
    return config


def _sources(config: EvalConfig) -> dict[str, Source]:
    """The data of a run, without a test split if it has scored other rows instead."""
    sources = find_sources(config)
    if _has_drawn_test_rows(config):
        sources.pop("test", None)
    return sources


def _has_drawn_test_rows(config: EvalConfig) -> bool:
    """Whether the test rows to score are some that the run has set aside; a test split beside them has no
    labels."""
    return config.split != "validation" and has_set_test_aside(config)


def compared(sides: Sequence[Sequence[Scored]], names: Sequence[str]) -> dict[str, Any]:
    """The contents of comparison.json: the two sides, each metric with difference, interval and test, and the
    rows that only one side gets right (for a regression: those whose errors differ most)."""
    first, *rest = [scored for side in sides for scored in side]
    for other in rest:
        check_same(first, other)
    judged = [[scored.judged(first.names) for scored in side] for side in sides]
    found: dict[str, Any] = {
        letter: {"run": name, "predictions": [str(scored.path) for scored in side]}
        for letter, name, side in zip("ab", names, sides, strict=True)
    }
    found |= {"kind": first.kind, "rows": len(first.rows), "metrics": differences(judged[0], judged[1])}
    if min(map(len, sides)) == 1:
        found["note"] = (
            "one run per side: the intervals cover other rows, not other seeds"
            if max(map(len, sides)) == 1
            else "one side has a single run and borrows the other side's spread over seeds"
        )

    def shown(rows: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"row": first.rows[row], **_beside_a_and_b(first.texts[row]), "label": first.labels[row]}
            | {letter: [s.predicted[row] for s in side] for letter, side in zip("ab", sides, strict=True)}
            for row in rows[:MOST_ROWS]
        ]

    if first.kind == NUMBER:
        a, b = (np.mean([np.asarray(run.error) for run in side], axis=0) for side in judged)
        order = np.argsort(b - a, kind="stable")
        a_closer, b_closer = order[::-1][: int((b > a).sum())], order[: int((b < a).sum())]
        found |= {"a_closer": len(a_closer), "b_closer": len(b_closer)}
        found |= {"a_closer_rows": shown(a_closer), "b_closer_rows": shown(b_closer)}
    else:
        only_a, only_b = right_in_one(*([np.asarray(run.right) for run in side] for side in judged))
        found |= {"only_a_right": len(only_a), "only_b_right": len(only_b)}
        found |= {"only_a_right_rows": shown(only_a), "only_b_right_rows": shown(only_b)}
    return found


def _beside_a_and_b(texts: dict[str, Any]) -> dict[str, Any]:
    """The texts of a row, of which a column may have the same name as one of the two sides."""
    return {f"column {name}" if name in ("a", "b") else name: text for name, text in texts.items()}


def table(found: dict[str, Any]) -> str:
    """The comparison for the terminal."""
    lines = []
    for letter in "ab":
        runs = len(found[letter]["predictions"])
        lines.append(f"{letter.upper()}: {found[letter]['run']}" + (f" ({runs} seeds)" if runs > 1 else ""))
    lines.append(f"{found['rows']:,} rows; {found['kind']}")
    cells = [["", "A", "B", "B - A", "95 % interval", "p", ""]]
    for name in (name for name in SHOWN[found["kind"]] if name in found["metrics"]):
        entry = found["metrics"][name]
        low, high = entry["low"], entry["high"]
        interval = "" if low is None else f"{short(low, sign='+')} to {short(high, sign='+')}"
        p_value = "" if entry["p_value"] is None else f"{entry['p_value']:.4f}".replace("0.0000", "<0.0001")
        signs = {"a": "", "b": "", "difference": "+"}
        numbers = (
            "not defined" if entry[key] is None else short(entry[key], sign=sign)
            for key, sign in signs.items()
        )
        cells.append([name, *numbers, interval, p_value, (entry["test"] or "") if p_value else ""])
    lines += [line.rstrip() for line in aligned(cells, left=(0, 6))]
    if found["kind"] == NUMBER:
        lines.append(f"closer to the target: A in {found['a_closer']:,} rows, B in {found['b_closer']:,}")
    else:
        lines.append(
            f"only one is right: A in {found['only_a_right']:,} rows, B in {found['only_b_right']:,}"
        )
    if "note" in found:
        lines.append(f"note: {found['note']}")
    return "\n".join(lines)
