"""The config of a run: all options, and the checks that need neither data nor model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ft.errors import UserError
from ft.launch import asked_precision
from ft.options import BatchOptions, DataOptions, EvalOptions, ModelOptions, OptimOptions, RunOptions
from ft.values import parse_duration, parse_weights, split_names

DEFAULT_GLOBAL_BATCH_SIZE = 32


@dataclass(kw_only=True)
class Config(RunOptions, OptimOptions, BatchOptions, DataOptions, ModelOptions):
    """Everything that decides a training run."""

    PURPOSE: ClassVar[str] = "training"
    DATA: ClassVar[tuple[str, ...]] = ("dataset_name", "train_file")

    def __post_init__(self) -> None:
        # A shell expands ~ at the start of a word, but not in --output_dir=~/run, and YAML never does.
        self.output_dir = os.path.expanduser(self.output_dir)
        self.resume_from_checkpoint = self.resume_from_checkpoint and os.path.expanduser(
            self.resume_from_checkpoint
        )
        # The same in every spelling: encodings, checkpoints and evaluations are identified by them.
        for name in ("text_column_names", "freeze", "lora_target_modules", "metrics", "slice_columns"):
            setattr(self, name, split_names(getattr(self, name)) or None)

    def check(self) -> None:
        """Raise `UserError` for the first value that is invalid whatever the data and the model."""
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: is not set; give a Hub id, a folder or a pkg: path.")
        self._check_output_dir()
        self._check_numbers()
        self._check_data()
        if self.max_train_steps is not None and (self.warmup_steps or 0) > self.max_train_steps:
            raise UserError(
                f"warmup_steps: found {self.warmup_steps}, more than max_train_steps = "
                f"{self.max_train_steps}; lower warmup_steps or train longer."
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise UserError(
                "lr_scheduler_type: constant has no warm-up, but warmup_steps or warmup_ratio is set; "
                "expected constant_with_warmup, or no warm-up."
            )
        if self.verify and self.preflight:
            raise UserError(
                "verify and preflight are both set, but each replaces the training run; leave one of the two "
                "out."
            )
        self._check_effects()
        if self.eval_strategy == "no":
            self.check_validated("eval_strategy is no")
        if self.num_seeds > 1 and self.resume_from_checkpoint not in (None, "latest"):
            raise UserError(
                f"resume_from_checkpoint: found {self.resume_from_checkpoint!r}, but num_seeds is "
                f"{self.num_seeds}: each seed has checkpoints of its own; expected latest."
            )
        if self.push_to_hub and self.num_seeds > 1:
            raise UserError(
                "push_to_hub: num_seeds trains several models; leave it out, and upload one of them with "
                "`hf upload`."
            )
        if not self.push_to_hub:
            for name in ("hub_model_id", "hub_private_repo"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name}: needs push_to_hub, which is not set; set it, or leave it out.")
        for name in ("class_weights", "pos_weight"):
            self.weights(name)
        if self.log_artifacts != "none" and not {"wandb", "all"} & set(self.tracker_names):
            raise UserError(
                f"log_artifacts: found {self.log_artifacts}, but report_to is "
                f"{', '.join(self.tracker_names) or 'none'}: artifacts are of wandb; name it there, or leave "
                "log_artifacts out."
            )
        if self.torch_compile and self.gradient_checkpointing and self.dropout_mode == "row_keyed":
            raise UserError(
                "torch_compile: with gradient_checkpointing, torch cannot compile the recomputation of "
                "row-keyed dropout masks; leave one of the two out, or set dropout_mode: torch."
            )
        self._check_recipes()
        parse_duration("max_time", self.max_time)
        parse_duration("hang_timeout", self.hang_timeout)

    def _check_effects(self) -> None:
        """Refuse what another option makes ineffective. An evaluation takes a run's config as it is."""
        if self.PURPOSE != "training":
            return
        needs = {
            "eval_steps": ("eval_strategy: steps", self.eval_strategy == "steps"),
            # "no" itself says that nothing is saved, and is how to turn off a recipe's checkpoints.
            "save_steps": ("save_strategy: steps", self.save_strategy != "epoch"),
            "early_stopping_threshold": ("early_stopping_patience", self.early_stopping_patience is not None),
        }
        for name, (other, is_there) in needs.items():
            value, default = getattr(self, name), getattr(RunOptions, name)
            if value != default and not is_there:
                raise UserError(
                    f"{name}: found {value}, which does nothing without {other}; set that, or leave {name} "
                    "out."
                )

    def check_validated(self, why_not: str) -> None:
        """Raise `UserError` if an option depends on a selection by validation rows; there is none, for the
        reason given."""
        if self.PURPOSE != "training":
            return
        for name in ("early_stopping_patience", "threshold_mode"):
            value = getattr(self, name)
            if value not in (None, "none"):
                raise UserError(
                    f"{name}: found {value}, but {why_not}, so nothing is chosen on validation rows; leave "
                    "one of the two out."
                )

    def repeatable(self) -> Config:
        """The same without what concerns the folder itself: it repeats the run, without resuming or removing
        anything."""
        return replace(self, resume_from_checkpoint=None, overwrite_output_dir=False)

    def private(self, **changes: Any) -> Config:
        """The same run with a single seed, without trackers and Hub, and with some changes."""
        alone: dict[str, Any] = {"num_seeds": 1, "report_to": "none", "log_artifacts": "none"}
        alone |= {"push_to_hub": False, "hub_model_id": None, "hub_private_repo": None}
        return replace(self, **alone, **changes)

    def _check_recipes(self) -> None:
        if not 0 < self.layerwise_lr_decay <= 1:
            raise UserError(
                f"layerwise_lr_decay: found {self.layerwise_lr_decay:g}, expected a number above 0 and up to "
                "1; 1 gives every layer the same rate."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(
                f"ema_decay: found {self.ema_decay:g}, expected a number between 0 and 1, such as 0.99; "
                "leave it out for no average."
            )
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
                if getattr(self, name):
                    raise UserError(
                        f"{name}: is for LoRA, but lora_rank is not set; set it, or leave it out."
                    )
        elif self.freeze:
            raise UserError(
                f"freeze: found {', '.join(self.frozen)}, but lora_rank is set: LoRA trains its own matrices "
                "and the head, and the pretrained weights are frozen already; keep one of them."
            )
        if "all-linear" in self.lora_targets and len(self.lora_targets) > 1:
            raise UserError("lora_target_modules: all-linear takes no other names; leave them out.")

    def _check_output_dir(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir: is not set; name a folder.")
        variable = re.search(r"\$(\w+|\{\w+\})", self.output_dir)
        if variable and not os.path.exists(self.output_dir):  # a folder of that name is not what is meant
            raise UserError(
                f"output_dir: found {self.output_dir!r}: {variable[0]} is replaced by a shell, not in a "
                "config file or in quotes; write the folder out, or give --output_dir on the command line."
            )

    def _check_numbers(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name}: found {value}, expected a finite number.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: found {value}, expected a number above 0.")
            if (isinstance(value, int) or name == "num_train_epochs") and value > LARGEST:
                raise UserError(f"{name}: found {value}, expected a number up to {LARGEST:,}.")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name}: found {value}, expected 0 or more.")
        if (self.per_device_train_batch_size or 1) * (self.gradient_accumulation_steps or 1) > LARGEST:
            raise UserError(
                "per_device_train_batch_size x gradient_accumulation_steps: found "
                f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps}, expected a "
                f"product up to {LARGEST:,}."
            )
        if self.seed + self.num_seeds > SEEDS:
            raise UserError(f"seed: found {self.seed}, expected a number below {SEEDS:,}.")
        for name in BELOW_ONE:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{name}: found {value}, expected a number from 0 to below 1.")

    def _check_data(self) -> None:
        if not any(getattr(self, name) for name in self.DATA):
            raise UserError(f"no {self.PURPOSE} data: set {' or '.join(self.DATA)}.")
        if self.dataset_name and self.train_file:
            raise UserError("dataset_name and train_file are both set; keep one of them.")
        for split in ("validation", "test") if self.PURPOSE == "training" else ():
            if getattr(self, f"{split}_split_name") and getattr(self, f"{split}_file"):
                raise UserError(f"{split}_split_name and {split}_file are both set; keep one of them.")
        for name in ("dataset_config_name", "validation_split_name", "test_split_name"):
            if getattr(self, name) and not self.dataset_name:
                raise UserError(f"{name}: needs dataset_name, which is not set; leave it out.")
        is_its_own = self.PURPOSE == "training" and self.train_split_name != Config.train_split_name
        if is_its_own and not self.dataset_name:
            raise UserError("train_split_name: needs dataset_name, which is not set; leave it out.")
        if self.validation_split_percentage + self.test_split_percentage >= 100:
            raise UserError(
                "validation_split_percentage + test_split_percentage: found "
                f"{self.validation_split_percentage:g} + {self.test_split_percentage:g}, which leaves no row "
                "to train on; expected a sum below 100."
            )
        if self.validation_split_name and self.validation_split_name == (self.test_split_name or "test"):
            raise UserError(
                f"validation_split_name: {self.validation_split_name!r} is the test split; a test split that "
                "chooses the model is no test. Leave it out to set training rows aside, or name another "
                "test_split_name."
            )
        texts = self.text_columns
        if self.label_delimiter == "":
            raise UserError(
                'label_delimiter: found an empty text; expected what separates labels, such as "|".'
            )
        if len(texts) > 2 or len(set(texts)) < len(texts):
            raise UserError(
                f"text_column_names: found {len(texts)} columns ({', '.join(texts)}), expected one or two "
                "different ones."
            )

    @property
    def frozen(self) -> list[str]:
        """The patterns of parameters that are not trained."""
        return split_names(self.freeze)

    @property
    def lora_targets(self) -> list[str]:
        """The modules that the user named for LoRA; empty if peft is to choose."""
        return split_names(self.lora_target_modules)

    @property
    def metric_names(self) -> list[str]:
        """The additional metrics that the user named."""
        return split_names(self.metrics)

    def weights(self, name: str) -> str | dict[str, float]:
        """The weights by label of an option: "none", "balanced", or a weight by label."""
        return parse_weights(name, getattr(self, name))

    @property
    def slice_names(self) -> list[str]:
        """The columns to slice by that the user named."""
        return split_names(self.slice_columns)

    @property
    def tracker_names(self) -> list[str]:
        """The trackers that the user named, as typed: "all" and "none" are still in it."""
        return split_names(self.report_to)

    @property
    def best_metric(self) -> str:
        """Name of the metric that selects the best model, without a leading eval/ or eval_; empty if the task
        is to choose it."""
        return (self.metric_for_best_model or "").removeprefix("eval/").removeprefix("eval_")

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of `best_metric` is better."""
        return self.is_higher_better(self.best_metric)

    def is_higher_better(self, metric: str) -> bool:
        """The same for any metric; greater_is_better applies only to `best_metric`."""
        if metric == self.best_metric and self.greater_is_better is not None:
            return self.greater_is_better
        return metric not in LOWER_IS_BETTER and not metric.endswith(LOWER_ENDINGS)


@dataclass(kw_only=True)
class EvalConfig(EvalOptions, Config):
    """Everything that decides an evaluation: the options of a training run, so that its config.yaml can be
    used here, and the split. Options that concern training (trackers, Hub, checkpoints, seeds, max_time,
    verify, preflight) have no effect here."""

    PURPOSE: ClassVar[str] = "evaluation"
    DATA: ClassVar[tuple[str, ...]] = ("dataset_name", "test_file", "validation_file", "train_file")

    def check(self) -> None:
        """See `Config.check`. A comparison needs no model and no data, and takes no other options: each run
        is scored with those of its own config."""
        if self.compare is None:
            super().check()
            return
        self._check_output_dir()
        if len(self.compared) != 2:
            raise UserError(
                f"compare: found {len(self.compared)} runs ({', '.join(self.compared)}), expected two."
            )
        plain = EvalConfig()
        changed = [name for name, value in asdict(self).items() if value != getattr(plain, name)]
        if others := [name for name in changed if name not in ("compare", "split", "output_dir")]:
            raise UserError(
                f"compare: {', '.join(others)} would do nothing: each run is scored on the data and by the "
                "options of its own config.yaml. Leave all but split and output_dir out, or score the runs "
                "by eval.py first, and compare those folders."
            )

    def mark(self, precision: str | None = None) -> str:
        """A hash of the model, of all options that decide the scores of an evaluation, except the split, and
        of the mixed precision (None: that of the launch). It identifies the predictions of an evaluation."""
        free = (
            "output_dir overwrite_output_dir resume_from_checkpoint split compare report_to run_name metrics "
            "slice_columns id_column_name suspected_label_errors dataloader_num_workers"
        ).split()
        values = {name: value for name, value in asdict(self).items() if name not in free}
        path = Path(self.model_name_or_path)
        values["model_name_or_path"] = str(path.resolve() if path.exists() else path)
        precision = precision or asked_precision()
        if precision != "no":
            values["mixed precision"] = precision
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def compared(self) -> list[str]:
        """The folders of the runs to compare."""
        return split_names(self.compare)


POSITIVE = (
    "max_length max_windows max_train_samples max_eval_samples max_predict_samples preprocessing_num_workers "
    "global_batch_size "
    "per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size num_train_epochs "
    "max_train_steps learning_rate head_learning_rate lora_rank lora_alpha adam_epsilon logging_steps "
    "eval_steps save_steps save_total_limit "
    "early_stopping_patience num_seeds"
).split()
NOT_NEGATIVE = (
    "validation_split_percentage test_split_percentage dataloader_num_workers weight_decay max_grad_norm "
    "warmup_steps early_stopping_threshold seed focal_gamma"
).split()
LOWER_IS_BETTER = "mse mae rmse mape smape mase brier_score wer cer perplexity".split()
LOWER_ENDINGS = ("loss", "error", "errors", "error_rate")
LARGEST = 2**31 - 1  # of the numbers that count rows, updates or processes
SEEDS = 2**32  # numpy's and torch's generators take these
BELOW_ONE = "warmup_ratio lora_dropout label_smoothing_factor adam_beta1 adam_beta2".split()
