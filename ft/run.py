"""One run's output folder and everything that happens beside the loop: log, evaluate, save, finish."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ft import checkpoint
from ft.checkpoint import Progress
from ft.cli import dump
from ft.config import Config, parse_duration
from ft.data.loader import EvaluationSampler, PlanSampler, RowDataset, build_loader
from ft.data.prepare import Data
from ft.errors import Stopped, UserError, printable
from ft.evaluation import Evaluation, evaluate, load_named_metrics
from ft.health import Health, LateReader
from ft.model import export, load_weights, write_whole
from ft.optim import set_learning_rate
from ft.output import check_output_dir, clear_output_dir, lock_output_dir
from ft.report import draw_training, end_summary, environment, model_card, progress_bar, start_summary
from ft.runtime import STARTED, Clock, HostGroup
from ft.signals import StopSignals
from ft.tasks.base import Task
from ft.tracking import Tracker, scalars, to_json
from ft.watchdog import Watchdog
from ft.writer import BackgroundWriter

if TYPE_CHECKING:
    from accelerate import Accelerator


MAX_NONFINITE = 3  # updates in a row
MAX_FAILED_SAVES = 3  # in a row


class _StopAsked(Exception):
    """Some process was asked to stop; raised on all of them at the same place."""


class Run:
    """The state of a run beside model and optimizer. Methods are called on all processes; the main one
    writes."""

    def __init__(self, config: Config, accelerator: Accelerator, task: Task) -> None:
        self.config, self.accelerator, self.task = config, accelerator, task
        self.output_dir = Path(config.output_dir)
        self.hosts = HostGroup(accelerator)
        self.checkpoint, warnings = self.hosts.from_main(lambda: check_output_dir(config))
        for warning in warnings:
            self.say(f"warning: {warning}")
        self.named = load_named_metrics(config.metric_names, task, accelerator)
        known = [*task.metric_names(), "loss", *(self.named.keys() if self.named else config.metric_names)]
        if config.best_metric not in known:
            raise UserError(
                f"metric_for_best_model: found {config.best_metric!r}, expected one of {', '.join(known)}."
            )

    def bar(self, **options: Any) -> Any:
        """A progress bar, shown by the main process on a terminal."""
        return progress_bar(self.accelerator.is_local_main_process, leave=False, **options)

    def say(self, text: str) -> None:
        """A line for the user, once."""
        if self.accelerator.is_main_process:
            print(printable(text), flush=True)

    def start(
        self, model: Any, optimizer: Any, scheduler: Any, sampler: PlanSampler, data: Data, tokenizer: Any,
        max_length: int, total: int, notes: list[str],
    ) -> Progress:  # fmt: skip
        """Restore a checkpoint if there is one to resume from, write what a run leaves at once, say what is
        to come."""
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.sampler, self.data, self.tokenizer = sampler, data, tokenizer
        self.max_length, self.total = max_length, total
        config, accelerator = self.config, self.accelerator
        if "validation" not in data.splits and config.eval_strategy != "no":
            notes.append("no validation rows (validation_split_percentage: 0): not evaluated on the way")
            config.eval_strategy = "no"
        self.hosts.from_main(lambda: self._hold(lock_output_dir(self.output_dir)))
        self.progress = Progress()
        if self.checkpoint is not None:
            self._resume(self.checkpoint, notes)
        elif config.resume_from_checkpoint:
            notes.append("no checkpoint to resume from: this run starts anew")
        self.say(
            start_summary(data, self.task, accelerator.unwrap_model(model), sampler, config, total, notes)
        )
        if accelerator.is_main_process:
            if self.checkpoint is None:
                clear_output_dir(self.output_dir, keep_checkpoints=not config.overwrite_output_dir)
            elif self.checkpoint.parent == self.output_dir / "checkpoints":
                # A crash may have come before this was done for it.
                checkpoint.settle(self.checkpoint, self.progress.best_step, config.save_total_limit)
            # Without what was said of the folder itself: the file repeats the run, it neither resumes nor
            # removes.
            repeat = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
            write_whole(self.output_dir / "config.yaml", dump(repeat))
            facts = environment(data, accelerator.num_processes, accelerator.device)
            write_whole(self.output_dir / "environment.json", to_json(facts, indent=1) + "\n")
        self.tracker = Tracker(
            accelerator, config, self.output_dir, self.progress.step, self.progress.metrics_rows
        )
        self._loaders: dict[str, Any] = {}
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        if accelerator.is_main_process:
            self._loss += self.progress.log_loss
        self.clock = Clock()
        self.latest: dict[str, Any] | None = None  # the last evaluation of this process
        self.writer = BackgroundWriter()
        self._saved_step = self.progress.step if self.checkpoint else -1
        self._stop_reason = ""
        self._late = LateReader()
        self.max_seconds = parse_duration("max_time", config.max_time)
        self.watchdog = Watchdog(
            parse_duration("hang_timeout", config.hang_timeout), accelerator.process_index
        )
        self.signals = StopSignals()
        self.signals.listen()
        self._rows = self._tokens = 0
        self._last = (0.0, 0, 0)  # seconds, rows and tokens at the last log
        self.updates_bar = progress_bar(
            accelerator.is_main_process, total=total, initial=self.progress.step, desc="train", unit="update"
        )
        return self.progress

    def epochs(self) -> Iterator[int]:
        """The epochs that are left; the sampler begins each where the run stands."""
        if self.progress.evaluation_due:  # it was stopped in the middle of it
            self.evaluate()
        while not self.finished():
            self.sampler.start(self.progress.step, self.total)
            yield self.progress.step // self.sampler.updates_per_epoch

    def finished(self) -> bool:
        """Whether the last update was made, or early stopping's patience has run out."""
        return self.progress.step >= self.total or self.stopped_early()

    # --- after an update

    def count(self, losses: list[torch.Tensor], grad_norm: torch.Tensor, slot: Any) -> None:
        """Note a finished update: the summed losses of its micro-batches on this process, and its true
        weight."""
        for loss in losses:
            self._loss += loss
        self._late.push((self.progress.step, slot.update_weight), losses, grad_norm)
        self.progress.log_weight += slot.update_weight
        self._rows += slot.update_rows
        self._tokens += slot.update_tokens
        self.updates_bar.update()
        self.watchdog.alive(f"update {self.progress.step:,}")

    def due(self, strategy: str, every: int | None) -> bool:
        """Whether it is time to evaluate or to save: at the end of the run, and as the strategy says."""
        step = self.progress.step
        if strategy == "no":
            return False
        if self.finished():
            return True
        return (
            step
            % (self.sampler.updates_per_epoch if strategy == "epoch" else every or self.config.logging_steps)
            == 0
        )

    @property
    def epoch(self) -> float:
        """Epochs done so far, with the fraction."""
        return self.progress.step / self.sampler.updates_per_epoch

    def log(self, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """One row of train/* and perf/*: the mean loss over the rows since the last log, the last gradient's
        norm."""
        loss = self._fold_loss() / self.progress.log_weight
        seconds = self.clock.seconds()
        elapsed, rows, tokens = (
            now - then for now, then in zip((seconds, self._rows, self._tokens), self._last, strict=True)
        )
        self._last = (seconds, self._rows, self._tokens)
        values = {
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": float(grad_norm),
            "perf/examples_per_second": rows / elapsed,
            "perf/tokens_per_second": tokens / elapsed,
        }
        self.tracker.log(self.progress.step, self.epoch, values)
        self.updates_bar.set_postfix(
            {"loss": f"{loss:.4f}", "lr": f"{learning_rate:.2e}", "examples/s": f"{rows / elapsed:.1f}"},
            refresh=False,
        )
        self._loss.zero_()
        self.progress.log_loss = self.progress.log_weight = 0.0

    def evaluate(self) -> None:
        """Score the validation rows, log eval/*, keep the model if it is the best so far, count patience."""
        progress, config = self.progress, self.config
        progress.evaluation_due = True
        with self.clock:
            try:
                values = self.score("validation").metrics
            except _StopAsked:
                self.stop()
            progress.evaluation_due = False
            self.tracker.log(
                progress.step, self.epoch, {f"eval/{key}": value for key, value in values.items()}
            )
            self.latest = values
            value = values[config.best_metric]
            sign = 1 if config.higher_is_better else -1
            if value is not None and not math.isnan(value):
                if progress.best_metric is None or sign * (value - progress.best_metric) > 0:
                    progress.best_metric, progress.best_step = value, progress.step
                    self._export("best", values)
                anchor = progress.patience_metric
                if anchor is None or sign * (value - anchor) > config.early_stopping_threshold:
                    progress.patience_metric, progress.evaluations_without_gain = value, 0
                    return
            progress.evaluations_without_gain += 1

    def save(self) -> None:
        """Save a checkpoint, of the sums since the last log, too. The disk is left to a thread."""
        with self.clock:
            self._watch_health(keep=0)
            loss = self._fold_loss()
            self._loss.zero_()
            if self.accelerator.is_main_process:
                self._loss += loss
            self.progress.log_loss, self.progress.metrics_rows = loss, self.tracker.rows
            self._saved_step = self.progress.step
            if not self.accelerator.is_main_process:
                return
            self.tracker.flush()
            self.writer.wait()  # before the copy, so that there is one at a time
            state = checkpoint.snapshot(self.accelerator, self.model, self.optimizer, self.scheduler)
            write = partial(
                checkpoint.write_checkpoint, self.output_dir / "checkpoints", state, asdict(self.progress),
                self._identity(), self.total, self.config.save_total_limit,
            )  # fmt: skip
            self.writer.submit(f"output_dir: the checkpoint of update {self.progress.step}", write)

    def stopped_early(self) -> bool:
        """Whether early stopping's patience has run out."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped` if any process got a signal or max_time has passed; raise `UserError`
        where numbers or the disk went wrong too often. To be called after every update."""
        try:
            self._agree()
        except _StopAsked:
            self.stop()
        self._watch_health()

    def _agree(self) -> None:
        """Let all processes know what one of them knows, and raise `_StopAsked` on all alike."""
        late = self.max_seconds is not None and time.monotonic() - STARTED > self.max_seconds
        asked, timeouts, failures = self.hosts.sum(
            self.signals.received is not None, late, self.writer.failures
        )
        if failures >= MAX_FAILED_SAVES:
            raise UserError(
                f"{failures:g} checkpoints in a row failed; {self.writer.last_error}. Make room, or name "
                "another output_dir, and resume from the last one that stands."
            )
        if asked or timeouts:
            self._stop_reason = self.signals.received or ("max_time" if timeouts else "a signal")
            raise _StopAsked

    def _watch_health(self, keep: int = 1) -> None:
        """Count what was not finite, and the loss spikes, in all updates but the last `keep`."""
        health = self.progress.health
        for (step, weight), loss, grad_norm in self._late.pop(keep):
            (total,) = self.hosts.sum(loss)
            before = health.nonfinite
            health.note(total / weight, math.isfinite(grad_norm))
            if health.nonfinite == before:
                continue
            if health.nonfinite_in_a_row == 1:
                self._first_nonfinite = self._rows_of(step)
                self.say(
                    f"warning: update {step:,} is skipped: its loss or gradient is not finite (loss "
                    f"{total / weight:g}, gradient norm {grad_norm:g}); its {self._first_nonfinite}"
                )
            if self.config.on_nonfinite == "error" and health.nonfinite_in_a_row >= MAX_NONFINITE:
                raise UserError(
                    f"{health.nonfinite_in_a_row} updates in a row, {step:,} the last, had a loss or "
                    f"gradient that is not finite; of the first, the {self._first_nonfinite}. None of them "
                    "changed the weights. Look at these rows, lower learning_rate or add warm-up; "
                    "on_nonfinite: skip goes on in any case."
                )

    def _rows_of(self, step: int) -> str:
        """The rows of the update that made `step` updates, as the user numbers them."""
        epoch, update = divmod(step - 1, self.sampler.updates_per_epoch)
        rows = self.sampler.dataset.rows.row[self.sampler.plan(epoch).rows(update)]
        return f"training rows are {', '.join(map(str, sorted(rows.tolist())))} (counted from 0)"

    # --- the end

    def score(self, split: str) -> Evaluation:
        """Evaluate the model on a split."""
        rows = self.data.splits[split]
        if split not in self._loaders:
            dataset = RowDataset(rows, self.tokenizer)
            sampler = EvaluationSampler(
                dataset, self.config.per_device_eval_batch_size, self.accelerator.num_processes
            )
            loader = build_loader(
                dataset, sampler, self.config.dataloader_num_workers, self.accelerator.device
            )
            self._loaders[split] = self.accelerator.prepare(loader)
        with self.bar(total=len(rows), desc=f"evaluate {split}", unit="rows") as bar:
            return evaluate(
                self.accelerator, self.task, self.model, self._loaders[split], rows, self.named,
                lambda count: self._after_batch(bar, count),
            )  # fmt: skip

    def _after_batch(self, bar: Any, count: int) -> None:
        bar.update(count)
        self.watchdog.alive(f"a batch of an evaluation after update {self.progress.step:,}")
        self._agree()

    def stop(self) -> NoReturn:
        """Save a checkpoint, wait until it stands, and end the run here, to be resumed: raises `Stopped`."""
        if self._saved_step != self.progress.step or self.progress.evaluation_due:
            self.save()
        self._wait_for_checkpoint()
        self.updates_bar.close()
        self.tracker.finish({})
        self._end()
        self.say(
            f"stopped after update {self.progress.step:,} ({self._stop_reason}); a checkpoint stands: go on "
            "with the same command and --resume_from_checkpoint latest"
        )
        raise Stopped

    def _wait_for_checkpoint(self) -> None:
        """Wait until the last write has ended; raises `UserError` on all processes if it failed."""
        self.writer.wait()
        if self.hosts.sum(self.writer.failures)[0]:
            raise UserError(
                f"{self.writer.last_error or 'output_dir cannot be written'}. An earlier checkpoint, if any, "
                "is untouched: make room, then resume from it."
            )

    def finish(self) -> None:
        """Write final/, score the test rows with the best model, write results.json and training.png, say how
        it went."""
        self._watch_health(keep=0)
        self.writer.wait()
        self.updates_bar.close()
        if self.stopped_early():
            self.say(
                f"stopped early: {self.config.early_stopping_patience} evaluations without a better "
                f"{self.config.best_metric}"
            )
        seconds = self.clock.seconds()
        if self.latest is None and self.config.eval_strategy != "no":
            self.latest = self._last_score("validation").metrics  # a finished run was resumed
        self._export("final", self.latest or {})
        if self.progress.best_metric is None:
            self.progress.best_step = self.progress.step
            self._export("best", self.latest or {})
            if self.config.eval_strategy == "no":
                self.say(
                    "not evaluated (eval_strategy: no), so best/ is the model of the last update, as "
                    "final/ is"
                )
        results: dict[str, Any] = {
            "train/total_steps": self.progress.step,
            "train/epochs": self.epoch,
            "train/nonfinite_updates": self.progress.health.nonfinite,
            "train/loss_spikes": self.progress.health.spikes,
            "best/step": self.progress.best_step,
            f"best/{self.config.best_metric}": self.progress.best_metric,
            "perf/train_seconds": seconds,
            "perf/examples_per_second": self._rows / seconds,
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/total_seconds": time.monotonic() - STARTED,
        }
        results |= {f"eval/{key}": value for key, value in (self.latest or {}).items()}
        if "test" in self.data.splits:
            if self.progress.best_step != self.progress.step:
                load_weights(self.model, self.output_dir / "best", self.accelerator)
            results |= {f"test/{key}": value for key, value in self._last_score("test").metrics.items()}
        if self.accelerator.is_main_process:
            write_whole(self.output_dir / "results.json", to_json(results, indent=1) + "\n")
            draw_training(self.output_dir, self.config.best_metric)
        self.tracker.finish(results)
        self._end()
        self.say(end_summary(results, self.config, self.output_dir))

    def _last_score(self, split: str) -> Evaluation:
        """`score`, when all updates are done: asked to stop in it, the run saves the last update's state."""
        try:
            return self.score(split)
        except _StopAsked:
            if self._saved_step != self.progress.step:
                load_weights(self.model, self.output_dir / "final", self.accelerator)  # best/ may be in it
            self.stop()

    # --- mechanics

    def _end(self) -> None:
        self.watchdog.end()
        if self.accelerator.is_main_process:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _hold(self, lock: Any) -> None:
        self._lock = lock  # of the main process, until it ends

    def _resume(self, path: Path, notes: list[str]) -> None:
        """Take up the run where a checkpoint has it."""
        saved = self.hosts.from_main(lambda: checkpoint.read_state(path))
        checkpoint.check_identity(path, saved["identity"], self._identity())
        progress = saved["progress"]
        self.progress = Progress(**{**progress, "health": Health(**progress["health"])})
        step, best_step = self.progress.step, self.progress.best_step
        if step > self.total:
            raise UserError(
                f"resume_from_checkpoint: {path} stands after update {step:,}, but this run has "
                f"{self.total:,}; raise max_train_steps or num_train_epochs, or choose an earlier checkpoint."
            )
        checkpoint.restore(path, self.accelerator, self.model, self.optimizer, self.scheduler)
        set_learning_rate(self.scheduler)
        notes.append(f"resumed from {path} after update {step:,}")
        if saved["total_updates"] != self.total:
            notes.append(
                f"the run has {self.total:,} updates instead of {saved['total_updates']:,}; its learning "
                "rates follow from that from here on"
            )
        # Other hosts may not see the folder.
        if best_step and not self.hosts.from_main(
            lambda: checkpoint.recover_folder(self.output_dir / "best")
        ):
            notes.append(f"best/ of update {best_step} is not in {self.output_dir}: chosen anew")
            self.progress.best_step, self.progress.best_metric = 0, None

    def _export(self, name: str, metrics: dict[str, Any]) -> None:
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            card = model_card(self.config, self.task, self.progress.step, scalars(metrics))
            model = self.accelerator.unwrap_model(self.model)
            export(model, state, self.tokenizer, self.max_length, self.output_dir / name, card)

    def _fold_loss(self) -> float:
        """The summed loss since the last log, over all processes."""
        return float(self.accelerator.reduce(self._loss, reduction="sum"))

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must share."""
        config = self.config
        model = self.accelerator.unwrap_model(self.model)
        steps, ratio = config.warmup_steps, config.warmup_ratio
        warmup = f"{ratio:g} of the updates for" if steps is None else f"{steps} updates of"
        shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
        return {
            "model": f"{type(model).__name__} {hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]}",
            "labels": self.task.state(),
            "data": self.data.fingerprint,
            "global_batch_size": config.global_batch_size,
            "seed": config.seed,
            "dropout_mode": config.dropout_mode,
            "schedule": f"{config.lr_scheduler_type}, rate {config.learning_rate:g}, {warmup} warmup",
        }
