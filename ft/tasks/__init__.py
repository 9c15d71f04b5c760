"""The tasks that can be learned: found here by name, and given their options."""

from ft.config import Config
from ft.tasks.base import Task


def build_task(config: Config) -> Task:
    """The task that the config names; its code is imported on request."""
    if config.task == "text_classification":
        from ft.tasks.text_classification import TextClassification

        return TextClassification(
            problem_type=config.problem_type,
            label_delimiter=config.label_delimiter,
            class_weights=config.weights("class_weights"),
            pos_weight=config.weights("pos_weight"),
            focal_gamma=config.focal_gamma,
            label_smoothing=config.label_smoothing_factor,
            threshold_mode=config.threshold_mode,
        )
    raise ValueError(f"unknown task {config.task!r}")
