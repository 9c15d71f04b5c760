"""The options of a run: one flat, typed, documented config, made of a small class per group of flags.

The docstring under a field is its `--help` text. `Config.check` holds what can be judged without data or
model."""

import math
import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from ft.errors import UserError
from ft.values import parse_duration, parse_weights, split_names

DEFAULT_GLOBAL_BATCH_SIZE = 32


@dataclass(kw_only=True)
class ModelOptions:
    """Model"""

    model_name_or_path: str = ""
    """Pretrained model: a Hub id, a local folder, or pkg:PACKAGE/path for files that an installed package
    ships."""
    model_revision: str = "main"
    """Branch, tag or commit of a model on the Hub."""
    tokenizer_name: str | None = None
    """Tokenizer, where it is not the model's own: a Hub id, a folder or a pkg: path."""
    config_overrides: str | None = None
    """Changes to the model's config, for example "hidden_dropout_prob=0,attention_probs_dropout_prob=0"."""
    trust_remote_code: bool = False
    """Run code that a model on the Hub brings along. Only for repositories that you have read."""
    allow_pickle: bool = False
    """Load weights from a pickle (pytorch_model.bin) where there is no safetensors file; torch reads tensors
    from it and nothing else."""


@dataclass(kw_only=True)
class DataOptions:
    """Data"""

    dataset_name: str | None = None
    """A Hub id, or a folder (a local copy of a Hub repository, saved `datasets`, train/validation/test files,
    or one sub-folder of .txt files per class), or a pkg: path to one."""
    dataset_config_name: str | None = None
    """Configuration (subset) of a dataset on the Hub, or of a local copy of one."""
    train_file: str | None = None
    """Training data: csv, tsv, json, jsonl (each also .gz), parquet, arrow, or a folder of class folders."""
    validation_file: str | None = None
    """Validation data, in any of the same formats."""
    test_file: str | None = None
    """Test data. It is scored once, at the end, and never chooses anything."""
    train_split_name: str = "train"
    """Name of the training split in dataset_name."""
    validation_split_name: str | None = None
    """Name of the validation split. Default: validation, valid or dev where there is one, else rows of the
    training split are set aside. Never the test split."""
    test_split_name: str | None = None
    """Name of the test split. Default: test, where there is one."""
    validation_split_percentage: float = 10.0
    """Share of the training rows (percent) set aside, stratified by label, where there is no validation
    split."""
    test_split_percentage: float = 0.0
    """Share of the training rows (percent) set aside as a test split, where there is none."""
    text_column_names: list[str] | str | None = None
    """The text column, or the two columns of a pair ("sentence1,sentence2"). Default: found by its name or
    type."""
    label_column_name: str | None = None
    """The label column. Default: label, labels, target, class, category or score, where there is one."""
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = None
    """What kind of label the column holds. Default: found in the training data (lists: multi-label; numbers
    that are not all whole: regression; else a single label) and said at the start."""
    label_delimiter: str | None = None
    """What stands between the labels of a row, for multi-label data without lists: "|" for "a|b". An empty
    text is a row without any label."""
    max_length: int | None = None
    """Longest text in tokens; what is cut is counted and said. Default: the model's own limit."""
    max_train_samples: int | None = None
    """Train on this many rows only, drawn at random (always the same rows)."""
    max_eval_samples: int | None = None
    """Validate on this many rows only, drawn at random (always the same rows)."""
    max_predict_samples: int | None = None
    """Test on this many rows only, drawn at random (always the same rows)."""
    on_bad_rows: Literal["error", "drop"] = "error"
    """Rows without a text or a label: stop and name them, or drop and count them."""
    on_duplicates: Literal["warn", "drop"] = "warn"
    """Training rows whose text is in the validation or test split, too: count them, or drop them from
    training."""
    preprocessing_num_workers: int | None = None
    """Processes that encode the texts. Default: one for a fast tokenizer, which has threads of its own, else
    every core."""
    overwrite_cache: bool = False
    """Encode the texts again, even where a cached encoding fits."""
    dataloader_num_workers: int = 0
    """Worker processes that build the batches, for each process. 0 builds them in the training process."""

    @property
    def text_columns(self) -> list[str]:
        """The text columns that the user named; empty where they are to be found."""
        return split_names(self.text_column_names)


@dataclass(kw_only=True)
class BatchOptions:
    """Length and batch"""

    task: Literal["text_classification"] = "text_classification"
    """What to learn."""
    global_batch_size: int | None = None
    """Rows per optimizer update, over all processes and accumulation steps, whatever the launch. Default:
    32."""
    per_device_train_batch_size: int | None = None
    """Most rows in a micro-batch; accumulation is derived from it. Default: a process's whole share of the
    update."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per update and process. With per_device_train_batch_size and without global_batch_size,
    the product with the number of processes is the global batch."""
    per_device_eval_batch_size: int = 64
    """Rows per batch in evaluation."""
    num_train_epochs: float = 3.0
    """Passes over the training rows; a part of an epoch is allowed."""
    max_train_steps: int | None = None
    """Number of optimizer updates; takes the place of num_train_epochs."""
    max_time: str | None = None
    """Stop, save a checkpoint and exit with 75 after this long ("90", "90s", "45m", "11h30m")."""


@dataclass(kw_only=True)
class OptimOptions:
    """Optimisation"""

    learning_rate: float = 5e-5
    """Highest learning rate of the schedule."""
    head_learning_rate: float | None = None
    """Learning rate of the new head, where it is to be another; it follows the same schedule."""
    layerwise_lr_decay: float = 1.0
    """Layer-wise decay of the learning rate: each layer has the rate of the one above it times this; the top
    layer and the head have the full rate, the embeddings are below the lowest layer. 0.9 is common, 1 is
    none."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; biases and normalisation weights are spared."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the norm of an update's whole gradient to this; 0 turns it off."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    """Shape of the learning rate over the updates."""
    warmup_ratio: float = 0.0
    """Share of the updates over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """Number of those updates; takes the place of warmup_ratio."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay (0.99 averages over about the last
    hundred updates); evaluations, best/ and final/ have it instead of the weights. Default: none."""
    freeze: list[str] | str | None = None
    """Parameters that are not trained, by patterns over their names as in a shell, which stand for whole
    parts between the dots: "embeddings", "embeddings,encoder.layer.[0-3]"."""
    lora_rank: int | None = None
    """Train LoRA matrices of this rank beside the frozen pretrained weights, and the head, through peft (an
    extra). best/ and final/ are merged and need no peft; their adapter/ is for it. It wants a higher learning
    rate. Default: no LoRA."""
    lora_alpha: int | None = None
    """Scale of LoRA: its product counts lora_alpha / lora_rank. Default: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before LoRA's matrices."""
    lora_target_modules: list[str] | str | None = None
    """Linear modules that get LoRA, by the ends of their names ("query,value"), or all-linear for all but the
    head. Default: those that peft has for the architecture."""
    label_smoothing_factor: float = 0.0
    """Weight of the uniform distribution that is mixed into the training labels (of one label a row)."""
    class_weights: dict[str, float] | str | None = None
    """What a training row counts, by its label: none, balanced (rows / (classes * rows of the class)), or
    weights by label ("a=2,b=0.5", JSON, or a mapping in YAML; 1 for the others). The loss of an update is the
    weighted mean, as in torch's CrossEntropyLoss. Evaluations are not weighted."""
    pos_weight: dict[str, float] | str | None = None
    """Multi-label: what a label that a row has counts against one that it has not: none, balanced (rows
    without the label / rows with it), or weights by label, as for class_weights; see torch's
    BCEWithLogitsLoss."""
    focal_gamma: float = 0.0
    """Focusing of the focal loss, for training on labels: terms are multiplied by (1 - p) to this power, so
    that what is right already counts little. 0 is the plain cross-entropy."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    torch_compile: bool = False
    """Compile the model with torch.compile."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """An update whose loss or gradient is not finite never changes the weights: stop after the third in a
    row, or skip and count them all."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, so that the same launch on the same device gives the same
    bits."""
    dropout_mode: Literal["row_keyed", "torch"] = "row_keyed"
    """Dropout masks as a function of the row, the same on any launch, or torch's own generator."""
    seed: int = 42
    """Seed of the new head, the order of the rows and dropout."""
    num_seeds: int = 1
    """Train so many times, with the seeds seed, seed + 1, ..., each in its own folder output_dir/seed-N, and
    report the mean and the spread."""


@dataclass(kw_only=True)
class RunOptions:
    """Run"""

    output_dir: str = "output"
    """Folder for everything that the run leaves."""
    overwrite_output_dir: bool = False
    """Remove the run that output_dir holds, and start anew."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from "latest" in output_dir (which starts anew where there is
    none)."""
    logging_steps: int = 10
    """Log every so many updates."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to evaluate on the validation rows. The last update is evaluated in any case but "no"."""
    eval_steps: int | None = None
    """Evaluate every so many updates, with eval_strategy steps. Default: logging_steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to save a checkpoint. The last update is saved in any case but "no"."""
    save_steps: int = 500
    """Save a checkpoint every so many updates, with save_strategy steps."""
    save_total_limit: int | None = 2
    """Keep this many checkpoints; old ones go after the new one stands. null keeps all."""
    hang_timeout: str | None = "30m"
    """End with an error, and the stacks of every process, when no update or batch of an evaluation ends in
    this time. null never does."""
    verify: bool = False
    """Instead of a training run: try this config on a matrix of launches, killed and resumed, too, a few
    updates each, and say in a table whether they give the same."""
    metric_for_best_model: str | None = None
    """Validation metric that chooses the model in best/; loss is one, too. Default: accuracy, for multi-label
    f1_micro, for regression spearmanr."""
    greater_is_better: bool | None = None
    """Whether a higher value of that metric is better. Default: yes, unless it is a loss or an error."""
    threshold_mode: Literal["none", "global", "per_label"] | None = None
    """Multi-label: the probability from which on a label counts as predicted: 0.5 (none), the best for micro
    F1 (global), or the best for each label's F1 (per_label), chosen on the validation rows and kept in the
    exported model, which eval.py follows unless this is none. Default: global."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better metric. Default: never."""
    early_stopping_threshold: float = 0.0
    """By how much the metric must improve to count as better for early stopping."""
    metrics: list[str] | str | None = None
    """Further validation metrics from the `evaluate` library, by name or folder ("accuracy,f1")."""
    slice_columns: list[str] | str | None = None
    """Columns of the data by whose values the results on validation and test rows are broken down, beside the
    length of the texts ("department,country")."""
    report_to: list[str] | str = "none"
    """Trackers beside metrics.jsonl: wandb, tensorboard, trackio, several of them, none, or all that are
    installed."""
    run_name: str | None = None
    """Name of the run in the trackers. Default: the name of output_dir."""


@dataclass(kw_only=True)
class Config(RunOptions, OptimOptions, BatchOptions, DataOptions, ModelOptions):
    """Everything that decides a training run."""

    PURPOSE: ClassVar[str] = "training"
    DATA: ClassVar[tuple[str, ...]] = ("dataset_name", "train_file")

    def __post_init__(self) -> None:
        # A shell writes out ~ where it stands alone, but not in --output_dir=~/run, and YAML never does.
        self.output_dir = os.path.expanduser(self.output_dir)
        self.resume_from_checkpoint = self.resume_from_checkpoint and os.path.expanduser(
            self.resume_from_checkpoint
        )
        # The same in every spelling: a checkpoint is held against them.
        self.freeze = split_names(self.freeze) or None
        self.lora_target_modules = split_names(self.lora_target_modules) or None

    def check(self) -> None:
        """Raise `UserError` for the first value that cannot be right, whatever the data and the model."""
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: is not set; give a Hub id, a folder or a pkg: path.")
        if not self.output_dir:
            raise UserError("output_dir: is not set; name a folder.")
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
        if self.eval_steps is not None and self.eval_strategy == "epoch":
            raise UserError(
                f"eval_steps: found {self.eval_steps}, but eval_strategy is epoch; set eval_strategy: steps, "
                "or leave eval_steps out."
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise UserError("early_stopping_patience needs evaluations; set eval_strategy to steps or epoch.")
        if self.num_seeds > 1 and self.resume_from_checkpoint not in (None, "latest"):
            raise UserError(
                f"resume_from_checkpoint: found {self.resume_from_checkpoint!r}, but num_seeds is "
                f"{self.num_seeds}: each seed has checkpoints of its own; expected latest."
            )
        for name in ("class_weights", "pos_weight"):
            self.weights(name)
        self._check_recipes()
        parse_duration("max_time", self.max_time)
        parse_duration("hang_timeout", self.hang_timeout)

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
                        f"{name}: is about LoRA, but lora_rank is not set; set it, or leave it out."
                    )
        elif self.freeze:
            raise UserError(
                f"freeze: found {', '.join(self.frozen)}, but lora_rank is set: LoRA trains its own matrices "
                "and the head, and the pretrained weights are frozen already; keep one of them."
            )
        if "all-linear" in self.lora_targets and len(self.lora_targets) > 1:
            raise UserError("lora_target_modules: all-linear stands alone; leave out the other names.")

    def _check_numbers(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name}: found {value}, expected a finite number.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: found {value}, expected a number above 0.")
            if isinstance(value, int) and value > LARGEST:
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
        for name in ("dataset_config_name", "validation_split_name", "test_split_name"):
            if getattr(self, name) and not self.dataset_name:
                raise UserError(f"{name}: is about dataset_name, which is not set; leave it out.")
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
                'label_delimiter: found an empty text; expected what stands between labels, as "|".'
            )
        if len(texts) > 2 or len(set(texts)) < len(texts):
            raise UserError(
                f"text_column_names: found {len(texts)} columns ({', '.join(texts)}), expected one or two "
                "different ones."
            )

    @property
    def frozen(self) -> list[str]:
        """The patterns of what is not trained."""
        return split_names(self.freeze)

    @property
    def lora_targets(self) -> list[str]:
        """The modules that the user named for LoRA; empty where peft is to choose."""
        return split_names(self.lora_target_modules)

    @property
    def metric_names(self) -> list[str]:
        """The further metrics that the user named."""
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
        """Name of the metric that chooses the best model, without a leading eval/ or eval_; empty where the
        task is to choose it."""
        return (self.metric_for_best_model or "").removeprefix("eval/").removeprefix("eval_")

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of `best_metric` is better."""
        lower = ("loss", "mse", "mae", "rmse", "hamming_loss", "brier_score", "log_loss")
        return self.best_metric not in lower if self.greater_is_better is None else self.greater_is_better


@dataclass(kw_only=True)
class EvalOptions:
    """Evaluation"""

    split: Literal["train", "validation", "test"] | None = None
    """The split to score. Default: test where there is one, else validation."""
    suspected_label_errors: bool = False
    """Write the rows whose label is likely wrong, found by cleanlab (an extra), to label_errors.jsonl."""
    compare: list[str] | str | None = None
    """Instead of scoring a model: two runs to hold against each other on the same rows ("RUN_A RUN_B"), each
    the folder of an evaluation, of a training run, or of the runs of several seeds."""


@dataclass(kw_only=True)
class EvalConfig(EvalOptions, Config):
    """Everything that decides an evaluation: the options of a training run, so that its config.yaml serves
    here, too, and the split."""

    PURPOSE: ClassVar[str] = "evaluation"
    DATA: ClassVar[tuple[str, ...]] = ("dataset_name", "test_file", "validation_file", "train_file")

    def check(self) -> None:
        """See `Config.check`. A comparison needs no model and no data."""
        if self.compare is None:
            super().check()
        elif len(self.compared) != 2:
            raise UserError(
                f"compare: found {len(self.compared)} runs ({', '.join(self.compared)}), expected two."
            )

    @property
    def compared(self) -> list[str]:
        """The folders of the runs to compare."""
        return split_names(self.compare)


POSITIVE = (
    "max_length max_train_samples max_eval_samples max_predict_samples preprocessing_num_workers "
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
LARGEST = 2**31 - 1  # of the numbers that count rows, updates or processes
SEEDS = 2**32  # numpy's and torch's generators take these
BELOW_ONE = "warmup_ratio lora_dropout label_smoothing_factor adam_beta1 adam_beta2".split()
