"""Rows prepared as in a run, with access to the results."""

import json
from contextlib import contextmanager

from ft.data.prepare import prepare_data
from ft.options import DataOptions
from ft.tasks.text_classification import TextClassification


class Prepared:
    """The data of some options; `encoded` counts the rows that were encoded for it."""

    def __init__(self, tokenizer, max_length=64, only=None, task=None, **options):
        self.task = task or TextClassification()
        self.encoded = 0
        options = {
            key: str(value) if key.endswith(("file", "name")) else value for key, value in options.items()
        }
        self.data = prepare_data(
            DataOptions(**options), self.task, tokenizer, max_length, self.progress, only
        )
        self.notes, self.facts, self.splits = self.data.notes, self.data.facts, self.data.splits
        self.names = self.task.label_names

    @contextmanager
    def progress(self, **options):
        yield self

    def update(self, count):
        self.encoded += count

    def texts(self, split):
        return self.splits[split].table["text"].to_pylist()

    def labels(self, split):
        return [self.task.describe_target(label) for label in self.splits[split].labels]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
