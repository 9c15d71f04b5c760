"""Short rows on which a model is tested before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ROWS, TOKENS, PADDING = 3, 5, 2  # three rows are tried, and beside a fourth


def short_rows(
    model: nn.Module, row_ids: list[int], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows of words from the middle of the vocabulary; they end with its end-of-text token, if any."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of several parts
    size = getattr(config, "vocab_size", 0)
    ids = torch.tensor(
        [[size // 2 + row + place for place in range(TOKENS)] for row in row_ids], device=device
    )
    end = getattr(config, "eos_token_id", None)
    if end is not None:
        ids[:, -1] = end if isinstance(end, int) else end[0]
    ids %= max(size, 2 * TOKENS)
    pad = nn.functional.pad
    return {
        "input_ids": pad(ids, (0, padding), value=getattr(config, "pad_token_id", None) or 0),
        "attention_mask": pad(torch.ones_like(ids), (0, padding)),
    }


def logits_of(model: nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's output for rows (rows, ...), in its current mode; nothing is drawn from the CPU's global
    generators."""
    with torch.random.fork_rng(devices=[]):
        outputs = model(**rows)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def evaluated_logits(model: nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same in evaluation mode."""
    was_training = model.training
    try:
        return logits_of(model.eval(), rows)
    finally:
        model.train(was_training)
