"""One run's output folder and everything that happens beside the loop: log, evaluate, save, finish."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from ft import checkpoint
from ft.checkpoint import Progress
from ft.cli import dump
from ft.config import Config, parse_duration
from ft.data.loader import EvaluationSampler, PlanSampler, RowDataset, build_loader
from ft.data.prepare import Data
from ft.errors import UserError
from ft.evaluation import Evaluation, evaluate, load_named_metrics
from ft.model import export, load_weights, recover_folder, write_whole
from ft.output import check_output_dir, clear_output_dir
from ft.report import draw_training, end_summary, environment, model_card, progress_bar, start_summary
from ft.runtime import STARTED, Clock
from ft.tasks.base import Task
from ft.tracking import Tracker, scalars

if TYPE_CHECKING:
    from accelerate import Accelerator


class Run:
    """The state of a run beside model and optimizer. Methods are called on all processes; the main one
    writes."""

    def __init__(self, config: Config, accelerator: Accelerator, task: Task) -> None:
        self.config, self.accelerator, self.task = config, accelerator, task
        self.output_dir = Path(config.output_dir)
        self.checkpoint = check_output_dir(config)
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
            print(text, flush=True)

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
        self.progress = Progress()
        if self.checkpoint is not None:
            saved = checkpoint.read_state(self.checkpoint)
            checkpoint.check_identity(self.checkpoint, saved["identity"], self._identity())
            self.progress = checkpoint.restore(self.checkpoint, accelerator, model, optimizer, scheduler)
            notes.append(f"resumed from {self.checkpoint} after update {self.progress.step:,}")
            there = [accelerator.is_main_process and recover_folder(self.output_dir / "best")]
            broadcast_object_list(there)  # other hosts may not see the folder
            if self.progress.best_step and not there[0]:
                notes.append(
                    f"best/ of update {self.progress.best_step} is not in {self.output_dir}: chosen anew"
                )
                self.progress.best_step, self.progress.best_metric = 0, None
        elif config.resume_from_checkpoint:
            notes.append("no checkpoint to resume from: this run starts anew")
        self.say(
            start_summary(data, self.task, accelerator.unwrap_model(model), sampler, config, total, notes)
        )
        if accelerator.is_main_process:
            if self.checkpoint is None:
                clear_output_dir(self.output_dir)
            self.output_dir.mkdir(parents=True, exist_ok=True)
            # Without what was said of the folder itself: the file repeats the run, it neither resumes nor
            # removes.
            repeat = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
            write_whole(self.output_dir / "config.yaml", dump(repeat))
            facts = environment(data, accelerator.num_processes, accelerator.device)
            write_whole(self.output_dir / "environment.json", json.dumps(facts, indent=1) + "\n")
        self.tracker = Tracker(accelerator, config, self.output_dir, self.progress.step)
        self._loaders: dict[str, Any] = {}
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        if accelerator.is_main_process:
            self._loss += self.progress.log_loss
        self.clock = Clock()
        self.latest: dict[str, Any] | None = None  # the last evaluation of this process
        self._rows = self._tokens = 0
        self._last = (0.0, 0, 0)  # seconds, rows and tokens at the last log
        self.updates_bar = progress_bar(
            accelerator.is_main_process, total=total, initial=self.progress.step, desc="train", unit="update"
        )
        return self.progress

    def epochs(self) -> Iterator[int]:
        """The epochs that are left; the sampler begins each where the run stands."""
        while not self.finished():
            self.sampler.start(self.progress.step, self.total)
            yield self.progress.step // self.sampler.updates_per_epoch

    def finished(self) -> bool:
        """Whether the last update was made, or early stopping's patience has run out."""
        return self.progress.step >= self.total or self.stopped_early()

    # --- after an update

    def count(self, losses: list[torch.Tensor], slot: Any) -> None:
        """Note a finished update: the summed losses of its micro-batches on this process, and its true
        weight."""
        for loss in losses:
            self._loss += loss
        self.progress.log_weight += slot.update_weight
        self._rows += slot.update_rows
        self._tokens += slot.update_tokens
        self.updates_bar.update()

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
        with self.clock:
            values = self.score("validation").metrics
            progress, config = self.progress, self.config
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
        """Save a checkpoint, of the sums since the last log, too."""
        with self.clock:
            loss = self._fold_loss()
            self._loss.zero_()
            if self.accelerator.is_main_process:
                self._loss += loss
            self.progress.log_loss = loss
            checkpoint.save_checkpoint(
                self.output_dir / "checkpoints", self.accelerator, self.model, self.optimizer, self.scheduler,
                self.progress, self._identity(), self.config.save_total_limit,
            )  # fmt: skip

    def stopped_early(self) -> bool:
        """Whether early stopping's patience has run out."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def out_of_time(self) -> bool:
        """Whether max_time has passed since the process started, on any process."""
        limit = parse_duration(self.config.max_time)
        if limit is None:
            return False
        late = torch.tensor(float(time.monotonic() - STARTED > limit), device=self.accelerator.device)
        return bool(self.accelerator.reduce(late, reduction="sum") > 0)

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
                self.accelerator, self.task, self.model, self._loaders[split], rows, self.named, bar
            )

    def stop(self) -> None:
        """Save a checkpoint and end the run here, to be resumed."""
        self.save()
        self.updates_bar.close()
        self.tracker.finish({})
        self.say(
            f"stopped after update {self.progress.step:,} (max_time); a checkpoint stands: go on with the "
            "same command and --resume_from_checkpoint latest"
        )

    def finish(self) -> None:
        """Write final/, score the test rows with the best model, write results.json and training.png, say how
        it went."""
        self.updates_bar.close()
        if self.stopped_early():
            self.say(
                f"stopped early: {self.config.early_stopping_patience} evaluations without a better "
                f"{self.config.best_metric}"
            )
        seconds = self.clock.seconds()
        if self.latest is None and self.config.eval_strategy != "no":
            self.latest = self.score("validation").metrics  # a finished run was resumed
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
            results |= {f"test/{key}": value for key, value in self.score("test").metrics.items()}
        if self.accelerator.is_main_process:
            write_whole(self.output_dir / "results.json", json.dumps(results, indent=1) + "\n")
            draw_training(self.output_dir, self.config.best_metric)
        self.tracker.finish(results)
        self.say(end_summary(results, self.config, self.output_dir))

    # --- mechanics

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
