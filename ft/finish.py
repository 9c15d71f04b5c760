"""The end of a run: the last model, the test rows scored once by the best model, results.json and the
picture."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ft.evaluation import Evaluation
from ft.model import load_weights, write_whole
from ft.report import draw_training, end_summary
from ft.runtime import STARTED
from ft.tracking import to_json

if TYPE_CHECKING:
    from ft.run import Run


def finish(run: Run) -> None:
    """Write final/, score the test rows with the best model, write results.json and training.png, say how it
    went. Called on all processes."""
    config, progress = run.config, run.progress
    run.settle()
    if run.stopped_early():
        run.say(
            f"stopped early: {config.early_stopping_patience} evaluations without a better "
            f"{config.best_metric}"
        )
    seconds = run.clock.seconds()
    if run.latest is None and config.eval_strategy != "no":
        run.latest = _last_score(run, "validation").metrics  # a finished run was resumed
    run.export("final", run.latest or {})
    if progress.best_metric is None:
        progress.best_step = progress.step
        run.export("best", run.latest or {})
        if config.eval_strategy == "no":
            run.say(
                "not evaluated (eval_strategy: no), so best/ is the model of the last update, as final/ is"
            )
    results: dict[str, Any] = {
        "train/total_steps": progress.step,
        "train/epochs": run.epoch,
        "train/nonfinite_updates": progress.health.nonfinite,
        "train/loss_spikes": progress.health.spikes,
        "best/step": progress.best_step,
        f"best/{config.best_metric}": progress.best_metric,
        "perf/train_seconds": seconds,
        "perf/examples_per_second": run.rows / seconds,
        "perf/tokens_per_second": run.tokens / seconds,
        "perf/total_seconds": time.monotonic() - STARTED,
    }
    results |= {f"eval/{key}": value for key, value in (run.latest or {}).items()}
    if "test" in run.data.splits:
        if progress.best_step != progress.step:
            load_weights(run.model, run.output_dir / "best", run.accelerator)
        results |= {f"test/{key}": value for key, value in _last_score(run, "test").metrics.items()}
    if run.accelerator.is_main_process:
        write_whole(run.output_dir / "results.json", to_json(results, indent=1) + "\n")
        draw_training(run.output_dir, config.best_metric)
    run.close(results)
    run.say(end_summary(results, config, run.task, run.output_dir))


def _last_score(run: Run, split: str) -> Evaluation:
    """Evaluate when all updates are done: asked to stop in it, the run saves the last update's state."""

    def restore_last_update() -> None:
        if not run.saved:
            load_weights(run.model, run.output_dir / "final", run.accelerator)  # best/ may be in it

    return run.score(split, before_stop=restore_last_update)
