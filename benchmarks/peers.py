"""The other ways to train, each run as `python -m benchmarks.peers NAME JSON` in a separate process."""

import json
import math
import random
import sys
import tempfile
import time
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.common import device, read_csv
from ft import pretrained
from ft.options import ModelOptions

OUTPUT = tempfile.TemporaryDirectory()  # for Trainers, which create a folder even if it stays empty

Step = dict[str, float]
datasets.disable_progress_bars()


def wait() -> None:
    """Wait for the work on a device, so that timing is right."""
    if device().type != "cpu":
        torch.accelerator.synchronize()


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """The model's config and tokenizer, as in train.py: with a padding token, and no token types that the
    model does not know."""
    config = AutoConfig.from_pretrained(model)
    return config, pretrained.load_tokenizer(ModelOptions(model_name_or_path=model), config)


def load_rows(path: str, tokenizer: Any, names: list[str], max_length: int) -> datasets.Dataset:
    """The encoded rows of a csv file, without padding, as users of the Trainer have them: memory-mapped from
    a file. `names` has the classes; if empty, it is filled."""
    texts, labels = read_csv(path)
    if not names:
        names.extend(sorted(set(labels)))
    with tempfile.TemporaryDirectory() as folder:  # a mapped file stays readable after it is unlinked
        return datasets.Dataset.from_dict(
            {"text": texts, "labels": [names.index(label) for label in labels]}
        ).map(
            lambda part: tokenizer(part["text"], truncation=True, max_length=max_length),
            batched=True,
            remove_columns="text",
            cache_file_name=f"{folder}/rows.arrow",
        )


def load_model(model: str, config: Any, classes: int) -> Any:
    """The pretrained model with a new head, in fp32."""
    config.num_labels, config.problem_type = classes, "single_label_classification"
    return AutoModelForSequenceClassification.from_pretrained(
        model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )


# --- transformers.Trainer


class Stopwatch(TrainerCallback):
    """Notes when training began and when every update ended, so that data loading is included.

    It waits for the device after every `wait_every`-th update; times in between are the host's."""

    def __init__(self, wait_every: int = 1) -> None:
        self.wait_every = wait_every

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step % self.wait_every == 0:
            wait()
        self.times.append(time.perf_counter())


def counting(collator: Any, counts: list[Step]) -> Any:
    """The collator, noting the real tokens, the positions and the rows of every batch in `counts`."""

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = collator(features)
        counts.append(batch_counts(batch))
        return batch

    return collate


class MixedTrainer(Trainer):
    """Groups by length as in an epoch of `rows_of_epoch` rows, but takes the batches in random order.

    The Trainer sorts rows within a quarter of an epoch, or within 50 batches, if that is less. The few rows
    of a benchmark would be sorted in parts that are too small, and padded more than a user's. And its own
    order begins with the longest texts, so a short run would measure only these."""

    rows_of_epoch: int

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        size = self.args.train_batch_size
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        within = min(max(1, self.rows_of_epoch // (4 * size)), 50)
        order = get_length_grouped_indices(lengths, size, mega_batch_mult=within)
        whole = len(order) // size * size
        batches = [order[begin : begin + size] for begin in range(0, whole, size)]
        random.Random(self.args.seed).shuffle(batches)
        return [row for batch in batches for row in batch] + order[whole:]


TUNED = {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}


def trainer_arguments(seed: int, learning_rate: float, **options: Any) -> TrainingArguments:
    """What all uses of the Trainer share."""
    return TrainingArguments(
        seed=seed,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device().type == "cpu",
        **options,
    )


def trainer(
    model: str, train: str, max_length: int, batch: int, updates: int, seed: int, learning_rate: float,
    defaults: bool = False, wait_every: int = 1, rows_of_epoch: int | None = None, **options: Any,
) -> dict[str, list[Step]]:  # fmt: skip
    """Some updates of transformers.Trainer with grouping by length and the fused AdamW, or at its defaults;
    for `wait_every` and `rows_of_epoch`, see Stopwatch and MixedTrainer; `options` are more of its
    arguments."""
    config, tokenizer = load_tokenizer(model)
    names: list[str] = []
    rows = load_rows(train, tokenizer, names, max_length)
    torch.manual_seed(seed)
    watch = Stopwatch(wait_every)
    counts: list[Step] = []
    run = (Trainer if defaults else MixedTrainer)(
        load_model(model, config, len(names)),
        trainer_arguments(
            seed,
            learning_rate,
            per_device_train_batch_size=batch,
            max_steps=updates,
            output_dir=OUTPUT.name,
            **({} if defaults else TUNED),
            **options,
        ),
        train_dataset=rows,
        data_collator=counting(DataCollatorWithPadding(tokenizer), counts),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    if not defaults:
        run.rows_of_epoch = rows_of_epoch or len(rows)
    run.train()
    seconds = [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]
    return {"steps": [{"seconds": s, **count} for s, count in zip(seconds, counts, strict=False)]}


def trainer_accuracy(
    model: str, train: str, test: str, max_length: int, batch: int, epochs: float, seed: int,
    learning_rate: float, warmup_ratio: float, weight_decay: float,
) -> dict[str, float]:  # fmt: skip
    """Test accuracy of the Trainer's last model, the seconds of training, and the sums of `batch_counts`."""
    config, tokenizer = load_tokenizer(model)
    names: list[str] = []
    train_rows = load_rows(train, tokenizer, names, max_length)
    test_rows = load_rows(test, tokenizer, names, max_length)
    torch.manual_seed(seed)
    updates = -(-len(train_rows) // batch) * epochs
    watch = Stopwatch()
    counts: list[Step] = []
    run = Trainer(
        load_model(model, config, len(names)),
        trainer_arguments(
            seed, learning_rate, per_device_train_batch_size=batch, per_device_eval_batch_size=64,
            num_train_epochs=epochs, warmup_steps=math.ceil(round(warmup_ratio * updates, 6)),
            weight_decay=weight_decay, output_dir=OUTPUT.name, **TUNED,
        ),
        train_dataset=train_rows,
        data_collator=counting(DataCollatorWithPadding(tokenizer), counts),
        processing_class=tokenizer,
        callbacks=[watch],
    )  # fmt: skip
    run.train()
    trained = counts[: len(watch.times) - 1]  # without what was fetched ahead, and the test rows below
    prediction = run.predict(test_rows)
    right = (prediction.predictions.argmax(-1) == prediction.label_ids).mean()
    sums = {key: sum(count[key] for count in trained) for key in trained[0]}
    return {"accuracy": float(right), "seconds": watch.times[-1] - watch.times[0], **sums}


def trainer_evaluation(model: str, rows: str, max_length: int, repeats: int) -> dict[str, Any]:
    """Seconds of repeated `Trainer.evaluate` at its defaults; and its positions, including padding."""
    config, tokenizer = load_tokenizer(model)
    names: list[str] = []
    encoded = load_rows(rows, tokenizer, names, max_length)
    counts: list[Step] = []
    run = Trainer(
        load_model(model, config, len(names)),
        TrainingArguments(
            output_dir=OUTPUT.name, report_to="none", disable_tqdm=True, use_cpu=device().type == "cpu"
        ),
        data_collator=counting(DataCollatorWithPadding(tokenizer), counts),
        processing_class=tokenizer,
    )
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run.evaluate(encoded)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "positions": sum(count["positions"] for count in counts) / repeats}


# --- loops


def batch_counts(batch: Any) -> Step:
    """Real tokens, the sum of the squared lengths, positions and rows of a batch."""
    mask = batch["attention_mask"]
    squares = int(mask.sum(dim=1).square().sum())
    return {"tokens": int(mask.sum()), "squares": squares, "positions": mask.numel(), "rows": len(mask)}


def loop(
    model: Any, loader: Any, optimizer: Any, scheduler: Any, backward: Any, epochs: int, updates: int | None
) -> list[Step]:
    """The loop of the well-known examples, with a clock; `updates` ends it early."""
    steps: list[Step] = []
    model.train()
    last = time.perf_counter()
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch).loss
            backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            wait()
            now = time.perf_counter()
            steps.append({"seconds": now - last, **batch_counts(batch)})
            last = now
            if len(steps) == updates:
                return steps
    return steps


def plain(
    model: str, train: str, max_length: int, batch: int, updates: int, seed: int, learning_rate: float
) -> dict[str, list[Step]]:
    """Some updates of the loop of Accelerate's examples: rows in random order, padding to the longest row of
    the batch, the default AdamW."""
    accelerator = Accelerator()
    config, tokenizer = load_tokenizer(model)
    names: list[str] = []
    rows = load_rows(train, tokenizer, names, max_length)
    torch.manual_seed(seed)
    network = load_model(model, config, len(names))
    loader = DataLoader(rows, shuffle=True, batch_size=batch, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    scheduler = get_scheduler("linear", optimizer, 0, updates)
    network, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    epochs = -(-updates // len(loader))
    return {"steps": loop(network, loader, optimizer, scheduler, accelerator.backward, epochs, updates)}


def tutorial(
    model: str, train: str, rows: int, batch: int, epochs: int, updates: int | None, seed: int,
    learning_rate: float, padding: str, validation: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The loop of the well-known tutorial: a sample of the rows, the default AdamW, a linear schedule.

    `padding`: "max_length" pads every text to the limit of tokenizer and model, as in the tutorial; with
    "do_not_pad" the collator pads to the longest of a batch, which computes the same in less time. With
    `validation`, the accuracy on as many of its rows."""
    config, tokenizer = load_tokenizer(model)
    limit = pretrained.longest_text(None, tokenizer, config)  # some tokenizers have none
    texts, labels = read_csv(train)
    names = sorted(set(labels))

    def sample(texts: list[str], labels: list[str]) -> Any:
        whole = datasets.Dataset.from_dict(
            {"text": texts, "labels": [names.index(label) for label in labels]}
        )
        drawn = whole.shuffle(seed=42).select(range(min(rows, len(whole))))
        return drawn.map(
            lambda part: tokenizer(part["text"], padding=padding, truncation=True, max_length=limit),
            batched=True,
            remove_columns="text",
        ).with_format("torch")

    def collate(part: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return to_device(dict(DataCollatorWithPadding(tokenizer)(part)), device())

    torch.manual_seed(seed)
    network = load_model(model, config, len(names)).to(device())
    loader = DataLoader(
        sample(texts, labels),
        shuffle=True,
        batch_size=batch,
        collate_fn=collate,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    scheduler = get_scheduler("linear", optimizer, 0, epochs * len(loader))
    begin = time.perf_counter()
    steps = loop(network, loader, optimizer, scheduler, torch.Tensor.backward, epochs, updates)
    result = {"steps": steps, "seconds": time.perf_counter() - begin, "updates_per_epoch": len(loader)}
    if validation:
        right = total = 0
        network.eval()
        for part in DataLoader(sample(*read_csv(validation)), batch_size=batch, collate_fn=collate):
            with torch.no_grad():
                logits = network(**part).logits
            right += int((logits.argmax(-1) == part["labels"]).sum())
            total += len(logits)
        result["accuracy"] = right / total
    return result


def to_device(batch: dict[str, torch.Tensor], device: Any) -> dict[str, torch.Tensor]:
    """A batch on another device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


PEERS = {
    function.__name__: function
    for function in (trainer, trainer_accuracy, trainer_evaluation, plain, tutorial)
}

if __name__ == "__main__":
    print(json.dumps(PEERS[sys.argv[1]](**json.loads(sys.argv[2]))))
