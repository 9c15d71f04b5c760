"""The end of a run: the last model, the test rows scored once with the best model, results.json, training.png
and report.html."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ft.best import forget_bests
from ft.checkpoint import is_defined
from ft.dashboard import artifacts, charts
from ft.ema import averaged
from ft.errors import UserError
from ft.evaluation import Evaluation, prefix_of
from ft.model import load_weights
from ft.output import write_whole
from ft.page import write_page
from ft.push import check_hub, push
from ft.report import draw_training, end_summary
from ft.tracking import to_json
from ft.values import scalars
from ft.words import count_parameters

if TYPE_CHECKING:
    from ft.run import Run


def finish(run: Run) -> None:
    """Write final/, score the test rows with the best model, write results.json, training.png and
    report.html, print the summary, and push best/ where that is asked. Called on all processes."""
    config, progress = run.config, run.progress
    # Even with save_strategy: no, a stop saves one: resumed from it, a finished run would be trained
    # again.
    if run.saver.step not in (-1, progress.step):
        run.save()
    run.settle()
    if run.stopped_early():
        run.say(
            f"stopped early: {config.early_stopping_patience} evaluations without a better "
            f"{config.best_metric}"
        )
    seconds, (rows, tokens) = run.train_seconds(), run.throughput.totals()
    if run.latest is None and config.eval_strategy != "no":
        run.latest = _last_score(run, "validation")  # a finished run was resumed
    run.export("final", run.latest)
    if progress.best_metric is None:
        progress.best_step, progress.best_calibration = progress.step, run.task.calibration
        run.export("best", run.latest)
        progress.best_values = scalars(run.latest.metrics) if run.latest else {}
        value = progress.best_values.get(config.best_metric)
        if config.eval_strategy == "no":
            why = "not evaluated (eval_strategy: no)"
        elif is_defined(value):
            progress.best_metric = value
            why = "the best model was not found again"
        else:
            why = f"{config.best_metric} was never defined on the validation rows"
        run.say(f"{why}, so best/ is the model of the last update, as final/ is")
    results: dict[str, Any] = {
        "headline": list(run.task.headline),
        "train/total_steps": progress.step,
        "train/epochs": run.epoch,
        "train/trainable_parameters": count_parameters(run.model)[1],
        "train/nonfinite_updates": progress.health.nonfinite,
        "train/loss_spikes": progress.health.spikes,
        "best/step": progress.best_step,
        **{f"best/{name}": value for name, value in progress.best_values.items() if name != "rows"},
        f"best/{config.best_metric}": progress.best_metric,
        "perf/train_seconds": seconds,
        "perf/examples_per_second": rows / seconds,
        "perf/tokens_per_second": tokens / seconds,
    }
    scored: dict[str, Evaluation] = {}
    if run.latest:
        scored["validation"] = run.latest
        results |= _assessed(run, "validation", run.latest)  # with what was chosen for these weights
    if "test" in run.data.splits:
        if progress.best_step != progress.step:
            _load(run, "best")
        run.task.calibration = progress.best_calibration
        scored["test"] = _last_score(run, "test")
        results |= _assessed(run, "test", scored["test"])
    run.signals.follows = "the run is ending"
    results["perf/total_seconds"] = run.total_seconds()
    if progress.earlier_totals:  # its config.yaml alone does not repeat such a run
        results["train/earlier_totals"] = progress.earlier_totals
    if run.accelerator.is_main_process:
        write_whole(run.output_dir / "results.json", to_json(results, indent=1) + "\n")
        forget_bests(run.output_dir)
        draw_training(run.output_dir, config.best_metric)
        write_page(run.output_dir, config, run.task, run.data, results, scored, run.accelerator)
    run.close(
        results,
        partial(charts, config, results, scored),
        partial(artifacts, config, run.data, results, run.output_dir),
    )
    run.say(end_summary(results, config, run.task, run.output_dir))
    if config.push_to_hub:
        run.say(f"pushed best/ to {run.hosts.from_main(lambda: _push(run))}")


def _push(run: Run) -> str:
    folder = run.output_dir / "best"
    try:
        repository = run.repository or check_hub(run.config)
    except UserError as error:
        raise UserError(
            f"{error} The run is finished; push it later: hf upload REPOSITORY {folder}"
        ) from None
    return push(repository, folder)


def _assessed(run: Run, split: str, result: Evaluation) -> dict[str, Any]:
    """What results.json has of a scored split; only its metrics on processes without scores."""
    found = result.metrics
    if result.scores is not None:
        found = run.assess(split, result)
    return {f"{prefix_of(split)}/{key}": value for key, value in found.items()}


def _last_score(run: Run, split: str) -> Evaluation:
    """Evaluate after all updates: if asked to stop meanwhile, the run saves the last update's state."""

    def restore_last_update() -> None:
        if split == "test" and not run.saved():
            _load(run, "final")  # best/ may be loaded

    return run.score(split, before_stop=restore_last_update)


def _load(run: Run, name: str) -> None:
    """Load the weights of best/ or final/ into the model, or into the average of its weights if it keeps
    one."""
    with averaged(run.optimizer):
        load_weights(run.model, run.output_dir / name, run.accelerator, run.task)
