"""What can be learned: one file a task, found here by name."""

from ft.tasks.base import Task


def task_named(name: str) -> type[Task]:
    """The class of a task, imported when it is asked for."""
    if name == "text_classification":
        from ft.tasks.text_classification import TextClassification

        return TextClassification
    raise ValueError(f"unknown task {name!r}")
