"""The losses of text classification. Each returns one number per row, so that the loop can weight, sum and
divide them whatever the launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LEAST_DOUBT = 1e-7  # 1 - p is kept above this: the slope of a power below 1 is infinite at 0


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0, gamma: float = 0.0
) -> torch.Tensor:
    """(rows,) of `logits` (rows, classes) and `labels` (rows,) int64.

    `smoothing` is the weight of the uniform distribution that is mixed into the labels, as in torch. `gamma`
    is the focusing of the focal loss: every class's term is multiplied by (1 - p) ** gamma, so that rows that
    are right already count little (Lin et al., 2017, "Focal Loss for Dense Object Detection")."""
    from torch.nn.functional import cross_entropy, log_softmax

    if not gamma:
        return cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    log_p = log_softmax(logits, dim=1)
    terms = -log_p * (-log_p.expm1()).clamp_min(LEAST_DOUBT).pow(gamma)  # (rows, classes)
    return (1 - smoothing) * terms.gather(1, labels[:, None])[:, 0] + smoothing * terms.mean(1)


def binary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, pos_weight: torch.Tensor | None = None, gamma: float = 0.0
) -> torch.Tensor:
    """(rows,) of `logits` (rows, labels) and `labels` (rows, labels) of 0 and 1: the mean over the labels.

    `pos_weight` (labels,) multiplies the terms of the labels that a row has, as in torch's
    BCEWithLogitsLoss; `gamma` is that of the focal loss, see `cross_entropy`."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    labels = labels.to(logits.dtype)
    terms = binary_cross_entropy_with_logits(logits, labels, pos_weight=pos_weight, reduction="none")
    if gamma:
        doubt = (labels - logits.sigmoid()).abs()  # 1 - p of the truth
        terms = terms * doubt.clamp_min(LEAST_DOUBT).pow(gamma)
    return terms.mean(1)
