"""Weights by label, against imbalance: balanced by the training rows, or the user's own."""

import numpy as np

from ft.errors import UserError

Weights = str | dict[str, float]  # "none", "balanced", or a weight by the name of a label


def label_weights(key: str, weights: Weights, names: list[str], balanced: np.ndarray) -> np.ndarray:
    """(labels,) float64: ones for "none", `balanced` for "balanced", else the user's; a label that is not
    named has 1. `UserError` for a name that is not a label; `key` is the option."""
    if isinstance(weights, str):
        return np.ones(len(names)) if weights == "none" else balanced
    unknown = sorted(set(weights) - set(names))
    if unknown:
        listed = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        raise UserError(
            f"{key}: no training row has the label{'s' if len(unknown) > 1 else ''} "
            f"{', '.join(map(repr, unknown))}; expected some of {listed}."
        )
    return np.array([weights.get(name, 1.0) for name in names])


def described(names: list[str], weights: np.ndarray) -> str:
    """ "bad=0.5, good=2" for a summary; the first few of many."""
    shown = ", ".join(f"{name}={weight:.4g}" for name, weight in zip(names[:8], weights, strict=False))
    return shown + (", ..." if len(names) > 8 else "")
