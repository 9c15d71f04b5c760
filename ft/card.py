"""The model card: what an exported model is, what it was trained on, how well it scored, how to load it.

Nothing in it depends on the test rows or on where the run is stored: the same config gives the same card."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from ft.analysis.summary import metric_intervals
from ft.config import Config
from ft.data.prepare import Data
from ft.data.sources import local_path
from ft.evaluation import Evaluation
from ft.options import BatchOptions, DataOptions, ModelOptions, OptimOptions
from ft.tasks.base import Task
from ft.values import short

RESAMPLES = 1000  # results.json uses ten times as many; this is done whenever a model is the best
ALWAYS = ("learning_rate", "global_batch_size", "seed", "lr_scheduler_type", "weight_decay")
OF_A_RUN = ("best", "final")  # folder names that say nothing about the model
# Stated elsewhere in the card, or not about the model.
LEFT_OUT = (
    "model_name_or_path dataset_name train_file validation_file test_file task "
    "max_length long_text max_windows overwrite_cache preprocessing_num_workers dataloader_num_workers "
    "max_time max_predict_samples per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps trust_remote_code allow_pickle"
).split()


def model_card(
    config: Config, task: Task, data: Data, max_length: int, step: int, scored: Evaluation | None,
    chosen: bool,
) -> str:  # fmt: skip
    """README.md of an exported model after `step` updates; `scored` is its evaluation on the validation rows,
    `chosen` whether they selected it among the models of other updates."""
    base, source = config.model_name_or_path, config.dataset_name or config.train_file or ""
    head = [f"pipeline_tag: {task.pipeline_tag}", "library_name: transformers"]
    if base_model := _earlier_base(base) if _is_local(base) else json.dumps(base):
        head.append(f"base_model: {base_model}")
    if config.dataset_name and not _is_local(source):
        head.append(f"datasets: [{json.dumps(source)}]")
    header, newline = "\n".join(head), "\n"
    rows = ", ".join(f"{data.facts[s]['rows']:,} {s}" for s in ("train", "validation") if s in data.splits)
    name = _name(base)
    return f"""---
{header}
---
# {config.run_name or f"{name}, fine-tuned"}

{name}, fine-tuned on {_name(source, "local data")} ({rows} rows) for {step:,} updates of
{data.rows_of_update(config.global_batch_size)} rows.

## Labels

{task.card_labels()}

## Data

{newline.join(_data(data))}

## Validation

{newline.join(_metrics(task, scored))}

## Settings

{newline.join(_settings(config))}

## Limits

{newline.join(_limits(config, task, max_length, scored, chosen))}

## Use

{task.card_usage(config.trust_remote_code)}
"""


def _is_local(name: str) -> bool:
    return name.startswith("pkg:") or local_path(name).exists()


def _name(source: str, local: str | None = None) -> str:
    """A name for a source where its path means nothing: `local`, or the last part of its path."""
    if source.startswith("pkg:"):
        return source.removeprefix("pkg:")
    if not _is_local(source):
        return source
    path = local_path(source).resolve()
    return local or (path.parent if path.name in OF_A_RUN else path).name


def _earlier_base(folder: str) -> str | None:
    """What the model of an earlier run was trained from, according to its card."""
    card = local_path(folder).resolve() / "README.md"
    if card.parent.name not in OF_A_RUN or not card.exists():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    return next(
        (line.removeprefix("base_model: ") for line in lines if line.startswith("base_model: ")), None
    )


def _data(data: Data) -> list[str]:
    """What the rows were, so that they can be identified."""
    lines = [
        f"- Text: {', '.join(f'`{name}`' for name in data.columns.texts)}; label: `{data.columns.label}`"
    ]
    for split, fingerprint in data.sources.items():
        if split != "test":
            lines.append(f"- {split}, SHA-256 of the source: `{fingerprint}`")
    dropped = {s: facts["dropped"] for s, facts in data.facts.items() if s != "test" and facts.get("dropped")}
    for split, reasons in dropped.items():
        lines.append(
            f"- {split}: left out " + ", ".join(f"{count:,} ({why})" for why, count in reasons.items())
        )
    return lines


def _metrics(task: Task, scored: Evaluation | None) -> list[str]:
    """A table of the metrics, with intervals if the scores are available."""
    if scored is None:
        return ["Not evaluated."]
    found: dict[str, Any] = {}
    if scored.scores is not None and scored.labels is not None:
        judged = task.judge(scored.scores, scored.labels)
        found = metric_intervals(judged, RESAMPLES)
    lines = [
        f"{scored.metrics['rows']:,} rows. In brackets the 95 percent bootstrap interval over rows "
        f"({RESAMPLES:,} resamples; for an accuracy of 1 or 0 Wilson's).", "",
        "| metric | value |", "|---|---|",
    ]  # fmt: skip
    for name, value in scored.metrics.items():
        if name == "rows" or not isinstance(value, int | float):
            continue
        interval = "" if found.get(name) is None else " ({} to {})".format(*map(short, found[name]))
        lines.append(f"| {name} | {short(value)}{interval} |")
    return lines


def _settings(config: Config) -> list[str]:
    """The options that decide what is learned and differ from their defaults."""
    groups = (BatchOptions, OptimOptions, DataOptions, ModelOptions)
    names = [name for group in groups for name in group.__annotations__ if name not in LEFT_OUT]
    defaults = {field.name: field.default for field in fields(config)}
    lines = ["| option | value |", "|---|---|"]
    for name in names:
        value = getattr(config, name)
        if name in ALWAYS or value != defaults[name]:
            value = _name(value) if name == "tokenizer_name" else value
            shown = json.dumps(value, ensure_ascii=False).replace("|", "\\|")  # or it would end the cell
            lines.append(f"| {name} | `{shown}` |")
    return lines


def _limits(
    config: Config, task: Task, max_length: int, scored: Evaluation | None, chosen: bool
) -> list[str]:
    """What the numbers do not say."""
    cut = {
        "truncate": "are cut there",
        "head_tail": "lose their middle (`long_text: head_tail`; a pipeline cuts their end)",
        "windows": f"are scored in up to {config.max_windows} windows of it (`long_text: windows`; a "
        "pipeline sees the first)",
    }
    lines = [f"- Texts of more than {max_length:,} tokens {cut[config.long_text or 'truncate']}."]
    calibration = ", ".join(task.calibration)
    if scored is not None and chosen:
        lines.append(
            "- The validation rows chose this model among those of other updates"
            + (f", and its {calibration}" if calibration else "")
            + ", so these numbers are a little too good; those of test rows are in the run's results.json."
        )
    elif scored is not None and calibration:
        lines.append(
            f"- The validation rows chose its {calibration}: what depends on that is a little too good."
        )
    lines.append(
        "- The numbers hold for rows drawn like these. Other sources, times or languages, or another "
        "training seed, give other numbers."
    )
    return lines
