"""One run's output folder and everything that happens around the loop: logging, evaluating, saving,
stopping."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ft import checkpoint
from ft.analysis.resampling import RESAMPLES
from ft.assess import assess
from ft.best import kept_best, weights_sample
from ft.card import model_card
from ft.checkpoint import Progress
from ft.cli import dump
from ft.config import Config
from ft.data.loader import PlanSampler, build_evaluation_loader
from ft.data.prepare import Data
from ft.data.slices import read_slice_columns
from ft.ema import averaged
from ft.errors import Stopped, UserError, writing
from ft.evaluation import Evaluation, evaluate, load_named_metrics
from ft.health import HealthWatch
from ft.hosts import HostGroup
from ft.lora import check_peft
from ft.model import check_tokens, export
from ft.output import OutputDir, clear_output_dir, write_whole
from ft.push import check_hub
from ft.report import environment, progress_bar, rows_notes, start_summary, validation_line
from ft.resume import identity, of_launch, resume, shapes_mark, weights_mark
from ft.runtime import STARTED, run_began
from ft.saver import Saver
from ft.sharded import is_sharded, whole_state
from ft.signals import StopSignals
from ft.tasks.base import Task
from ft.throughput import Clock, Throughput
from ft.tracking import Tracker, to_json
from ft.train_loss import TrainLoss
from ft.unseen import learned_before
from ft.values import parse_duration, scalars
from ft.watchdog import Watchdog
from ft.words import with_all_words

if TYPE_CHECKING:
    from accelerate import Accelerator


class StopAsked(Exception):
    """Some process was asked to stop, for the reason given; raised on all at the same point."""


class Run:
    """The state of a run besides model and optimizer. Methods are called on all processes; the main one
    writes."""

    takes_best = True  # along, when it resumes from a checkpoint in another folder

    def __init__(self, config: Config, accelerator: Accelerator, task: Task) -> None:
        self.config, self.accelerator, self.task = config, accelerator, task
        self.began = run_began()
        self.output_dir = Path(config.output_dir)
        self.folder = OutputDir(config)
        self.hosts = HostGroup(accelerator)
        self.say = self.hosts.say
        self.bar = partial(progress_bar, accelerator.is_local_main_process, leave=False)
        self.hosts.check_same(of_launch(config, accelerator))
        self.checkpoint, warnings = self.hosts.from_main(self.folder.look)
        for warning in warnings:
            self.say(f"warning: {warning}")
        if config.lora_rank is not None:
            check_peft()
        if not config.metric_names:  # what these compute is known once they are loaded
            self._check_best_metric([])
        try:
            self.repository: str = self.hosts.from_main(lambda: check_hub(config))
        except UserError as error:
            if self.checkpoint is None:
                raise
            self.repository = ""  # a resumed run can do without the Hub until its end
            self.say(f"warning: {error} It is asked again at the end.")

    def _load_metrics(self) -> list[str]:
        """Once it is known what the task learns: load the metrics that the user named, on the main process,
        which computes them, and settle which one selects the best model. Returns notes for the user."""
        config = self.config

        def load() -> tuple[list[str], list[str]]:
            self.named = load_named_metrics(config.metric_names, self.task, self.accelerator)
            return (self.named.keys(), self.named.notes) if self.named else ([], [])

        self.named = None
        keys, notes = self.hosts.from_main(load)
        config.metric_for_best_model = config.best_metric or self.task.default_metric
        self._check_best_metric(keys)
        return notes

    def _check_best_metric(self, named: list[str]) -> None:
        """Raise `UserError` if nothing computes the metric that is to select the best model."""
        best, known = self.config.best_metric, [*self.task.metric_names(), "loss", *named]
        if best and best not in known:
            raise UserError(f"metric_for_best_model: found {best!r}, expected one of {', '.join(known)}.")

    def compare_hosts(self, data: Data, model: Any) -> None:
        """Raise `UserError` on all processes if one has read other data or another model, before any of it is
        exchanged. Keeps what identifies the model in checkpoints."""
        self.pretrained, self.shapes = weights_mark(model), shapes_mark(model)
        self.hosts.check_same(
            {"data": data.fingerprint, "model": self.shapes, "pretrained model": self.pretrained}
        )

    def start(
        self, model: Any, optimizer: Any, scheduler: Any, sampler: PlanSampler, data: Data, tokenizer: Any,
        max_length: int, total: int, notes: list[str],
    ) -> Progress:  # fmt: skip
        """Restore the checkpoint to resume from, if any, write the first files of the run, and print the
        summary."""
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.sampler, self.data, self.tokenizer = sampler, data, tokenizer
        self.max_length, self.total = max_length, total
        config, accelerator = self.config, self.accelerator
        check_tokens(accelerator.unwrap_model(model), tokenizer, data.splits)
        self.hosts.from_main(lambda: read_slice_columns(config, data))
        # Before a checkpoint is restored: an older one's groups have no names.
        self.rate_names = [group["name"] for group in optimizer.param_groups]
        notes += [*self._load_metrics(), *learned_before(config, data, self.task.state())]
        if "validation" not in data.splits and config.eval_strategy != "no":
            none = "no validation rows (validation_split_percentage: 0)"
            config.check_validated(f"there are {none}")
            notes.append(f"{none}: no evaluations during training: best/ will be the last model")
            config.eval_strategy, config.eval_steps = "no", None
        notes += rows_notes(config, data)
        self.checkpoint = self.hosts.from_main(self.folder.hold)
        made = self.output_dir / "checkpoints"  # another host may know it by another name
        self.has_own_checkpoint = self.hosts.from_main(lambda: checkpoint.is_own(self.checkpoint, made))
        self.progress = Progress()
        if is_sharded(model):
            from ft.fsdp import finish_sharding

            finish_sharding(accelerator, model)
        if self.checkpoint is not None:
            try:
                self.progress = resume(self, self.checkpoint, notes)
            except UserError:
                if accelerator.is_main_process:
                    self.folder.release()
                raise
        elif config.resume_from_checkpoint:
            notes.append("no checkpoint to resume from: this run starts anew")
        self.progress.precision = accelerator.mixed_precision
        self._total_seconds_before = self.progress.total_seconds
        plain = accelerator.unwrap_model(model)
        self.say(start_summary(data, self.task, plain, sampler, config, total, notes, accelerator))
        if accelerator.is_main_process:
            self._begin_in_folder()
        saved = self.progress.step if self.has_own_checkpoint else -1
        self.saver = Saver(self.hosts, self.output_dir, saved, self.progress.best_step)
        self.tracker = Tracker(
            accelerator, config, self.output_dir, self.progress.step, self.progress.metrics_rows,
            make_room=self.saver.wait,  # a checkpoint that fails is removed, and may have filled the disk
        )  # fmt: skip
        self._loaders: dict[str, Any] = {}
        self.train_loss = TrainLoss(accelerator, self.progress)
        self.clock, self._seconds_before = Clock(), self.progress.train_seconds
        self.latest: Evaluation | None = None  # the last evaluation of this process
        self._said_undefined = False  # that the selecting metric is not defined
        self.health = HealthWatch(
            self.progress.health,
            self.hosts.sum,
            sampler.rows_of,
            self.say,
            config.on_nonfinite,
            self.tracker.alert,
        )
        self.max_seconds = parse_duration("max_time", config.max_time)
        self.watchdog = Watchdog(
            parse_duration("hang_timeout", config.hang_timeout), accelerator.process_index
        )
        weakref.finalize(self, self.watchdog.end)  # for a run that failed in a process that lives on
        self.signals = StopSignals()
        self.signals.listen()
        self.throughput = Throughput(sampler, self.progress.step, self.clock)
        self.updates_bar = progress_bar(
            accelerator.is_main_process, total=total, initial=self.progress.step, desc="train", unit="update"
        )
        return self.progress

    def _begin_in_folder(self) -> None:
        """On the main process: clear output_dir of what is not this run's, and write environment.json
        and config.yaml."""
        config = self.config
        if self.checkpoint is None:
            # With `latest`, the existing ones are damaged, and were reported as kept; the run is the same.
            keep = ("checkpoints", "wandb_id") if config.resume_from_checkpoint else ()
            clear_output_dir(self.output_dir, keep)
        elif self.has_own_checkpoint:
            with writing(self.checkpoint.parent):  # a crash may have come before this was done
                checkpoint.settle(self.checkpoint, self.progress.best_step, config.save_total_limit)
            if not self.finished():  # a finished run that continues is unfinished until its new end
                for name in ("results.json", "report.html", "training.png"):
                    (self.output_dir / name).unlink(missing_ok=True)
        facts = environment(config, self.data, self.accelerator)
        # First: a config.yaml without it is taken for the user's own.
        write_whole(self.output_dir / "environment.json", to_json(facts, indent=1) + "\n")
        write_whole(self.output_dir / "config.yaml", dump(config.repeatable()))

    def epochs(self) -> Iterator[int]:
        """The remaining epochs, after an evaluation that is still due; the sampler begins each at the run's
        current update."""
        progress = self.progress
        # The run was stopped in the middle of it, or shortened to its current update, now its end.
        is_new_end = self.finished() and progress.evaluated_step < progress.step
        if progress.evaluation_due or (is_new_end and self.config.eval_strategy != "no"):
            self.evaluate()
            if self.finished() and self.config.save_strategy != "no":
                self.save()  # or the checkpoint would record another best model, or more patience
        while not self.finished():
            self.sampler.start(self.progress.step, self.total)
            yield self.progress.step // self.sampler.updates_per_epoch

    def finished(self) -> bool:
        """Whether the last update was made, or early stopping's patience has run out."""
        return self.progress.step >= self.total or self.stopped_early()

    # --- an update

    def count(self, losses: list[torch.Tensor], grad_norm: torch.Tensor, slot: Any) -> None:
        """Note a finished update: the summed losses of its micro-batches on this process, and its true
        weight."""
        self.train_loss.add(losses, slot.update_weight)
        share = slot.update_rows / self.data.rows_of_update(self.config.global_batch_size)
        self.health.push(self.progress.step, slot.update_weight, share, losses, grad_norm)
        self.throughput.count(slot)
        self.updates_bar.update()
        self.watchdog.alive(f"update {self.progress.step:,}")

    def due(self, strategy: str, every: int | None) -> bool:
        """Whether it is time to evaluate or save: at the end of the run, and as the strategy says."""
        if strategy == "no":
            return False
        if self.finished():
            return True
        if strategy == "epoch":
            every = self.sampler.updates_per_epoch
        return self.progress.step % (every or self.config.logging_steps) == 0

    def train_seconds(self) -> float:
        """Seconds of all updates, including those before a resume; without evaluations and saves."""
        return self._seconds_before + self.clock.seconds()

    def total_seconds(self) -> float:
        """Seconds over all starts of the run, including everything that is not training."""
        return self._total_seconds_before + time.monotonic() - self.began

    @property
    def epoch(self) -> float:
        """Epochs completed so far, including the fraction."""
        return self.progress.step / self.sampler.updates_per_epoch

    def log(self, grad_norm: torch.Tensor, learning_rates: Sequence[torch.Tensor | float]) -> None:
        """One row of train/*, perf/* and data/*: the mean loss over the rows since the last log, the last
        gradient norm, the learning rate and, if there are several, that of each group."""
        loss, rate = self.train_loss.take_mean(), float(learning_rates[0])
        values = {"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": float(grad_norm)}
        groups = {name: rate for name, rate in zip(self.rate_names, learning_rates, strict=True) if name}
        if len(groups) > 1:
            values |= {f"train/learning_rate/{name}": float(rate) for name, rate in groups.items()}
        values |= self.throughput.since_last(self.hosts.gather)
        self.tracker.log(self.progress.step, self.epoch, values)
        speed = f"{values['perf/examples_per_second']:.1f}"
        shown = {"loss": f"{loss:.4f}", "lr": f"{rate:.2e}", "examples/s": speed}
        self.updates_bar.set_postfix(shown, refresh=False)

    def evaluate(self) -> None:
        """Score the validation rows, log eval/*, keep the model if it is the best so far, count patience."""
        progress, config = self.progress, self.config
        progress.evaluation_due = True
        with self._apart():
            self.latest = self.score("validation")
            values = self.latest.metrics
            progress.evaluation_due, progress.evaluated_step = False, progress.step
            self.tracker.log(
                progress.step, self.epoch, {f"eval/{key}": value for key, value in values.items()}
            )
            before, value = progress.best_step, values[config.best_metric]
            self.updates_bar.clear()  # on a terminal
            self.say(f"update {progress.step:,} of {self.total:,}: {validation_line(values, config)}")
            if not (checkpoint.is_defined(value) or self._said_undefined):
                self._said_undefined = True
                self.say(
                    f"after update {progress.step:,}, {config.best_metric} is not defined on the validation "
                    "rows and these predictions, so this model cannot be the best; metric_for_best_model "
                    "names another metric"
                )
            sign = 1 if config.higher_is_better else -1
            if not progress.weigh(value, sign, config.early_stopping_threshold):
                return
            progress.best_calibration, progress.best_values = self.task.calibration, scalars(values)
            self.saver.wait()  # for disk space: a checkpoint that cannot be written is removed
            known = before and before == self.saver.best_step
            self.export("best", self.latest, kept_best(self.output_dir, before) if known else None)
            if self.accelerator.is_main_process:
                progress.best_weights = weights_sample(self.output_dir / "best")

    def save(self) -> None:
        """Save a checkpoint, including the sums since the last log. A thread writes it to disk."""
        with self._apart():
            self.health.check()
            self.train_loss.fold()
            self.progress.train_seconds = self.train_seconds()
            self.progress.total_seconds = self.total_seconds()
            self.progress.metrics_rows = self.tracker.rows
            self.saver.save(
                self.progress,
                self.tracker.flush,
                lambda: checkpoint.snapshot(self.accelerator, self.model, self.optimizer, self.scheduler),
                lambda: identity(self),
                self.total,
                self.config.save_total_limit,
            )

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Exclude this time from training, on all processes: while the main one writes, the others wait here,
        not in their next update."""
        with self.clock:
            yield
            self.hosts.sum(0)

    def saved(self) -> bool:
        """Whether a checkpoint of the last update has been written; waits for it. To be called on all
        processes."""
        return self.saver.stands(self.progress.step)

    def stopped_early(self) -> bool:
        """Whether early stopping's patience has run out."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped` if any process got a signal or max_time has passed; raise `UserError`
        after too many non-finite updates or failed writes. To be called after every update."""
        late = self.health.late()
        asked, totals = self._agree(*(loss for _, loss, _ in late))
        self.health.note(late, totals)
        if asked:
            self.stop(asked)

    def _agree(self, *losses: float) -> tuple[StopAsked | None, list[float]]:
        """Let all processes know what one of them knows, in one exchange: whether the run is to stop, and the
        sums of `losses` over the processes."""
        is_late = self.max_seconds is not None and time.monotonic() - STARTED > self.max_seconds
        signals, timeouts, failures, *totals = self.hosts.sum(
            self.signals.received is not None, is_late, self.saver.failures, *losses
        )
        if not self.finished():  # then nothing would be lost: all but the scores of the test rows is done
            self.saver.check(failures)
        if not (signals or timeouts):
            return None, totals
        return StopAsked(self.signals.received or ("max_time" if timeouts else "a signal")), totals

    # --- evaluate, stop, export

    def score(self, split: str, before_stop: Callable[[], object] | None = None) -> Evaluation:
        """Evaluate the model on a split. If asked to stop meanwhile, the run calls `before_stop`, saves and
        ends here."""
        rows = self.data.splits[split]
        if split not in self._loaders:
            loader = build_evaluation_loader(rows, self.tokenizer, self.config, self.accelerator)
            self._loaders[split] = self.accelerator.prepare(loader)
        try:
            bar = self.bar(total=len(rows), desc=f"evaluate {split}", unit="rows")
            with bar, averaged(self.optimizer):
                return evaluate(
                    self.accelerator, self.task, self.model, self._loaders[split], rows, self.named,
                    lambda count: self._after_batch(bar, count), calibrate=split == "validation",
                )  # fmt: skip
        except StopAsked as asked:
            if before_stop is not None:
                before_stop()
            self.stop(asked)

    def _after_batch(self, bar: Any, count: int) -> None:
        bar.update(count)
        self.watchdog.alive(f"a batch of an evaluation after update {self.progress.step:,}")
        asked, _ = self._agree()
        if asked:
            raise asked

    def stop(self, asked: StopAsked) -> NoReturn:
        """Save a checkpoint, wait until it is written, and end the run here, to be resumed: raises
        `Stopped`."""
        for _ in range(2):  # a failed write is retried once
            if not self.saved():
                self.save()
        self.saver.wait_until_it_stands()
        self.updates_bar.close()
        said = (
            f"stopped after update {self.progress.step:,} ({asked}); a checkpoint is saved: "
            "rerun the same command with --resume_from_checkpoint latest"
        )
        self.tracker.alert("The run was stopped", said, "WARN")
        self.close({})
        self.say(said)
        raise Stopped

    def settle(self) -> None:
        """After the last update: wait until all updates have been checked and the checkpoint is written."""
        self.health.check()
        if self.progress.log_weight:  # early stopping came between two logs
            self.tracker.log(self.progress.step, self.epoch, {"train/loss": self.train_loss.take_mean()})
        with self.clock:
            self.saver.wait()
        self.updates_bar.close()

    def close(self, summary: dict[str, Any], *shown: Callable[[], Any]) -> None:
        """Close trackers and watchdog, and release the folder. For the trackers: `summary`, empty if the run
        is to be resumed, and functions that make charts and artifacts (see `Tracker.finish`)."""
        self.watchdog.end()
        self.tracker.finish(summary, *shown)  # an upload may take longer than hang_timeout
        if self.accelerator.is_main_process:
            self.folder.release()

    def assess(self, split: str, result: Evaluation, resamples: int = RESAMPLES) -> dict[str, Any]:
        """Everything that results.json has for a scored split. To be called on the main process, which has
        the scores."""
        return assess(self.task, self.data, split, result, resamples)

    def export(self, name: str, scored: Evaluation | None, keep: Path | None = None) -> None:
        """Write the current model to best/ or final/, with its results on the validation rows (`scored`) on
        the card; an earlier one there is kept as `keep`, or removed."""
        chosen = name == "best" and self.progress.best_metric is not None
        with averaged(self.optimizer):
            model = self.accelerator.unwrap_model(self.model)
            state = whole_state(model, self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                card = model_card(
                    self.config, self.task, self.data, self.max_length, self.progress.step, scored, chosen
                )
                state = self.task.export_weights(with_all_words(model, state), model.config)
                export(model, state, self.tokenizer, self.max_length, self.output_dir / name, card, keep)
