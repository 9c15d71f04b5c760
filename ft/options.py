"""The options, flat and typed, one small class per group of flags; the docstring under a field is its
`--help` text."""

from dataclasses import dataclass
from typing import Literal

from ft.values import split_names


@dataclass(kw_only=True)
class ModelOptions:
    """Model"""

    model_name_or_path: str = ""
    """Pretrained model: a Hub id, a local folder, or pkg:PACKAGE/path for files shipped with an installed
    package."""
    model_revision: str = "main"
    """Branch, tag or commit of a model on the Hub."""
    tokenizer_name: str | None = None
    """Tokenizer, if it is not the model's own: a Hub id, a folder or a pkg: path."""
    config_overrides: str | None = None
    """Changes to the model's config, for example "hidden_dropout_prob=0,attention_probs_dropout_prob=0"."""
    trust_remote_code: bool = False
    """Run custom code from a model repository on the Hub. Only for repositories whose code you have read."""
    allow_pickle: bool = False
    """Load weights from a pickle (pytorch_model.bin) if there is no safetensors file; torch reads only
    tensors from it."""


@dataclass(kw_only=True)
class DataOptions:
    """Data"""

    dataset_name: str | None = None
    """A Hub id, or a folder (a local copy of a Hub repository, saved `datasets`, train/validation/test files,
    or one subfolder of .txt files per class, also .gz), or a pkg: path to one."""
    dataset_config_name: str | None = None
    """Configuration (subset) of a dataset on the Hub, or of a local copy of one."""
    train_file: str | None = None
    """Training data: csv, tsv, json, jsonl (each also .gz), parquet, arrow, a saved `datasets` folder, or a
    folder of class folders."""
    validation_file: str | None = None
    """Validation data, in any of the same formats."""
    test_file: str | None = None
    """Test data. It is scored once, at the end, and never used to choose anything."""
    train_split_name: str = "train"
    """Name of the training split in dataset_name."""
    validation_split_name: str | None = None
    """Name of the validation split. Default: validation, valid, dev or val if there is one, else rows of the
    training split are set aside. Never the test split."""
    test_split_name: str | None = None
    """Name of the test split. Default: test, if there is one."""
    validation_split_percentage: float = 10.0
    """Share of the training rows (percent) to set aside, stratified by label, if there is no validation
    split."""
    test_split_percentage: float = 0.0
    """Share of the training rows (percent) to set aside as a test split, if there is none."""
    text_column_names: list[str] | str | None = None
    """The text column, or the two columns of a pair ("sentence1,sentence2"). Default: inferred from names or
    types."""
    label_column_name: str | None = None
    """The label column. Default: label, labels, target, class, category, intent, sentiment, stars or score,
    if there is one."""
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = None
    """Kind of label that the column holds. Default: inferred from the training data (lists: multi-label;
    numbers that are not all whole: regression; else a single label) and reported at the start."""
    label_delimiter: str | None = None
    """Separator between the labels of a row, for multi-label data without lists: "|" for "a|b". An empty text
    is a row without any label."""
    max_length: int | None = None
    """Maximum length of a text in tokens; truncation is counted and reported. Default: the model's own limit,
    or 512 if it has none."""
    long_text: Literal["truncate", "head_tail", "windows"] | None = None
    """What the model sees of a longer text: its beginning; the first quarter of max_length from its beginning
    and the rest from its end; or all of it, in overlapping windows of max_length that are scored together as
    one row (the mean of their scores). The exported model records it. Default: what the model was trained
    with, else truncate."""
    max_windows: int | None = None
    """Maximum number of windows per text, with long_text windows. Each needs the memory of a row; a smaller
    per_device_train_batch_size makes up for it. Default: what the model was trained with, else 8."""
    max_train_samples: int | None = None
    """Train on this many rows only, drawn at random (always the same rows)."""
    max_eval_samples: int | None = None
    """Validate on this many rows only, drawn at random (always the same rows)."""
    max_predict_samples: int | None = None
    """Test on this many rows only, drawn at random (always the same rows)."""
    on_bad_rows: Literal["error", "drop"] = "error"
    """Rows without a text or a label: stop and name them, or drop and count them."""
    on_duplicates: Literal["warn", "drop"] = "warn"
    """Training rows whose text is also in the validation or test split, and validation rows whose text is
    also in the test split: count them, or drop them."""
    preprocessing_num_workers: int | None = None
    """Processes that encode the texts. Default: for a fast tokenizer, which is multi-threaded, the run
    itself, or two beside it for large data (20 MB of text); else, from 5 MB on, one per core."""
    overwrite_cache: bool = False
    """Encode the texts again, even if a matching encoding is cached."""
    dataloader_num_workers: int = 0
    """Worker processes per process that build the batches. 0 builds them in the training process."""

    @property
    def text_columns(self) -> list[str]:
        """The text columns that the user named; empty if they are to be inferred."""
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
    """Maximum rows in a micro-batch; gradient accumulation is derived from it. Default: a process's whole
    share of the update."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per update and process. With per_device_train_batch_size and without global_batch_size,
    the product with the number of processes is the global batch."""
    per_device_eval_batch_size: int = 64
    """Rows per batch in evaluation (windows, with long_text windows)."""
    num_train_epochs: float = 3.0
    """Passes over the training rows; fractions are allowed."""
    max_train_steps: int | None = None
    """Number of optimizer updates. If both are set, it overrides num_train_epochs; but --num_train_epochs on
    the command line cancels the max_train_steps of a config file."""
    max_time: str | None = None
    """Stop, save a checkpoint and exit with 75 after this time ("90", "90s", "45m", "11h30m")."""


@dataclass(kw_only=True)
class OptimOptions:
    """Optimisation"""

    learning_rate: float = 5e-5
    """Peak learning rate of the schedule."""
    head_learning_rate: float | None = None
    """Learning rate of the new head, if different; it follows the same schedule."""
    layerwise_lr_decay: float = 1.0
    """Layer-wise learning rate decay: each layer's rate is that of the layer above times this; the top layer
    and the head have the full rate, the embeddings come below the lowest layer. 0.9 is common; 1 means no
    decay."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; biases and normalisation weights are exempt."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Maximum norm of an update's whole gradient, by clipping; 0 turns it off."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    """Shape of the learning rate schedule. (cosine_with_restarts has one cycle, Transformers' default, and so
    equals cosine.)"""
    warmup_ratio: float = 0.0
    """Share of the updates over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """Number of warm-up updates. If both are set, it overrides warmup_ratio; but --warmup_ratio on the
    command line cancels the warmup_steps of a config file."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay (0.99 averages over about the last
    hundred updates); evaluations, best/ and final/ use it instead of the weights. Default: none."""
    freeze: list[str] | str | None = None
    """Parameters that are not trained, as shell-style patterns that match whole dot-separated parts of their
    names: "embeddings", "embeddings,encoder.layer.[0-3]"."""
    lora_rank: int | None = None
    """Train LoRA matrices of this rank beside the frozen pretrained weights, and the head, using peft (an
    extra). best/ and final/ are merged and need no peft; their adapter/ is for peft. LoRA needs a higher
    learning rate. Default: no LoRA."""
    lora_alpha: int | None = None
    """Scale of LoRA: its matrices' product is multiplied by lora_alpha / lora_rank. Default: twice the
    rank."""
    lora_dropout: float = 0.0
    """Dropout before LoRA's matrices."""
    lora_target_modules: list[str] | str | None = None
    """Linear modules that get LoRA, by the ends of their names ("query,value"), or all-linear for all but the
    head. Default: peft's choice for the architecture."""
    label_smoothing_factor: float = 0.0
    """Weight of the uniform distribution that is mixed into the training labels (single-label only)."""
    class_weights: dict[str, float] | str | None = None
    """Weight of a training row by its label: none, balanced (rows / (classes * rows of the class)), or
    weights by label ("a=2,b=0.5", JSON, or a mapping in YAML; 1 for the others). The loss of an update is the
    weighted mean, as in torch's CrossEntropyLoss (with label_smoothing_factor, of the rows' smoothed losses).
    Evaluations are not weighted."""
    pos_weight: dict[str, float] | str | None = None
    """Multi-label: weight of a row's positive labels relative to its negative ones: none, balanced (rows
    without the label / rows with it), or weights by label, as for class_weights; see torch's
    BCEWithLogitsLoss."""
    focal_gamma: float = 0.0
    """Focusing parameter of the focal loss, for training on labels: terms are multiplied by (1 - p) to this
    power, so that what is already right counts little. 0 is the plain cross-entropy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    torch_compile: bool = False
    """Compile the model's layers with torch.compile."""
    tf32: bool = False
    """Let a GPU multiply fp32 matrices as TF32, which has 10 mantissa bits instead of 23: faster, but less
    precise. (bf16 and fp16 belong to the launch: accelerate launch --mixed_precision bf16.)"""
    on_nonfinite: Literal["error", "skip"] = "error"
    """An update with a non-finite loss or gradient never changes the weights: stop after the third in a row,
    or skip and count them all."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, so that the same launch on the same device is bit-identical."""
    dropout_mode: Literal["row_keyed", "torch"] = "row_keyed"
    """Dropout masks as a function of the row, the same on any launch, or from torch's own generator."""
    seed: int = 42
    """Seed of the new head, the row order and dropout."""
    num_seeds: int = 1
    """Number of seeds to train with: seed, seed + 1, ..., each in its own folder output_dir/seed-N; reports
    the mean and the spread."""


@dataclass(kw_only=True)
class RunOptions:
    """Run"""

    output_dir: str = "output"
    """Folder for everything that the run writes."""
    overwrite_output_dir: bool = False
    """Remove the run in output_dir, and start from scratch or from another run's checkpoint (its own are then
    kept as superseded-step-N)."""
    resume_from_checkpoint: str | None = None
    """Resume from a checkpoint folder, also of another run, or from "latest" in output_dir (which starts from
    scratch if there is none)."""
    logging_steps: int = 10
    """Log every this many updates."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to evaluate on the validation rows. The last update is always evaluated, except with "no"."""
    eval_steps: int | None = None
    """Evaluate every this many updates, with eval_strategy steps. Default: logging_steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to save a checkpoint. The last update is always saved, except with "no"."""
    save_steps: int = 500
    """Save a checkpoint every this many updates, with save_strategy steps."""
    save_total_limit: int | None = 2
    """Number of checkpoints to keep, besides that of the best model; others are removed once the new one is
    written. null keeps all."""
    hang_timeout: str | None = "30m"
    """End with an error, and a stack trace of every process, if no update or evaluation batch finishes in
    this time. null disables it."""
    verify: bool = False
    """Instead of training: run this config under a matrix of launches, also killed and resumed, a few updates
    each, and show in a table whether the results agree."""
    preflight: bool = False
    """Instead of training: check the data, make the longest update, save and reload a checkpoint, and
    forecast the time and memory of the run. Exit code 0 if data and machine are fit for it, else 2. See
    preflight.json in output_dir."""
    metric_for_best_model: str | None = None
    """Validation metric that selects the model in best/; may be loss. Default: accuracy; f1_micro for
    multi-label; spearmanr for regression."""
    greater_is_better: bool | None = None
    """Whether a higher value of that metric is better. Default: yes, unless it is a loss or an error."""
    threshold_mode: Literal["none", "global", "per_label"] | None = None
    """Multi-label: the probability threshold of a label: 0.5 (none), the best for micro F1 (global), or the
    best for each label's F1 (per_label), chosen on the validation rows and stored in the exported model;
    eval.py uses it unless this is none. Default: global."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without improvement. Default: never."""
    early_stopping_threshold: float = 0.0
    """Minimum improvement of the metric that counts for early stopping."""
    metrics: list[str] | str | None = None
    """More metrics of validation and test rows, from the `evaluate` library, by name or folder ("f1,./mine").
    F1, precision and recall are macro for classes, micro for multi-label."""
    slice_columns: list[str] | str | None = None
    """Columns of the data by whose values results on validation and test rows are broken down, in addition to
    text length ("department,country")."""
    report_to: list[str] | str = "none"
    """Trackers in addition to metrics.jsonl: wandb, tensorboard, trackio, several of them, none, or all
    (those installed)."""
    run_name: str | None = None
    """Name of the run in the trackers. Default: the name of output_dir."""
    log_texts: bool = True
    """Show the worst errors with their texts in W&B. false for private data: no text of a row goes to any
    tracker."""
    log_artifacts: Literal["none", "dataset", "model", "all"] = "none"
    """What W&B stores as artifacts: the data set (its fingerprint and statistics, no copy), the model in
    best/, or both."""
    push_to_hub: bool = False
    """Upload best/ to the Hub at the end. The repository is created before training."""
    hub_model_id: str | None = None
    """Repository to upload to, "name" or "organisation/name". Default: the name of output_dir."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private. Default: the setting of your account or organisation."""


@dataclass(kw_only=True)
class EvalOptions:
    """Evaluation"""

    split: Literal["train", "validation", "test"] | None = None
    """Split to score. Default: test if there is one, else validation, else train; with --compare, test if the
    runs have scored it, else validation."""
    id_column_name: str | None = None
    """Column to copy to the predictions, to identify rows. Default: id, idx or row_id, if there is one."""
    predictions_format: Literal["jsonl", "csv", "parquet"] = "jsonl"
    """Format of the predictions. csv and parquet have a column probability_LABEL for each label; csv joins
    several labels of a row with label_delimiter, or "|". --compare reads only jsonl."""
    suspected_label_errors: bool = False
    """Write rows whose label is likely wrong, found by cleanlab (an extra), to label_errors.jsonl."""
    compare: list[str] | str | None = None
    """Instead of scoring a model: compare two runs on the same rows ("RUN_A RUN_B"), each the folder of an
    evaluation, of a training run, or of the runs of several seeds."""
