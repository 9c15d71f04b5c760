"""Trains only the word embeddings of tokens in the data, out of the table for the whole vocabulary.

AdamW changes every row of the table in every update, although most tokens occur in no text of the data; a row
that never gets a gradient is only changed by weight decay. Here the model has the rows of the data's tokens,
and one more, of ones, that no token uses: weight decay shrinks it like all the omitted rows, which are put
back when a model is exported. (Abdaoui et al., 2020, cut a vocabulary to that of the data for good.) What a
model outputs, learns and exports stays the same up to rounding.

The table is half of a BERT of width 384, and two thirds of an XLM-R. Measured (two CPU threads, in turn with
the whole table): updates of the first on short texts are 1.016 times as fast with 11,600 of 30,522 rows, 1.23
times with as many of 250,000."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ft.lora import has_lora
from ft.trial import PADDING, ROWS, evaluated_logits, short_rows

if TYPE_CHECKING:
    from ft.hosts import HostGroup


class UsedWords(nn.Embedding):
    """Replaces a table of word embeddings (vocabulary, width). `weight` (tokens + 1, width) has the rows of
    `tokens` (tokens,), and one of ones; any other token is an error.

    `pretrained` is the whole table, on the host, if this process is to `keep` it for an export."""

    places: torch.Tensor

    def __init__(self, table: nn.Embedding, tokens: torch.Tensor, keep: bool) -> None:
        rows = table.weight.detach()
        rows_and_ones = torch.cat([rows[tokens], rows.new_ones(1, rows.shape[1])])
        super().__init__(len(tokens) + 1, rows.shape[1], _weight=rows_and_ones)
        self.num_embeddings = len(rows)  # of the tokens that are kept
        places = torch.full((len(rows),), len(tokens) + 1)
        places[tokens] = torch.arange(len(tokens))
        self.register_buffer("places", places, persistent=False)
        self.tokens = tokens
        # A copy: `rows` may be mapped from a file, which others may change before the run ends.
        self.pretrained = rows.clone() if keep else None
        if table.padding_idx is not None:
            self.padding_idx = int(places[table.padding_idx])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens) to (rows, tokens, width)."""
        return super().forward(self.places[input_ids])

    def table(self, weight: torch.Tensor) -> torch.Tensor:
        """The whole table (vocabulary, width) that `weight` stands for."""
        assert self.pretrained is not None, "another process has been told to keep it"
        weight = weight.cpu()
        table = self.pretrained * weight[-1]
        table[self.tokens] = weight[:-1]
        return table


def train_used_words(model: Any, tokenizer: Any, data_tokens: np.ndarray, hosts: HostGroup) -> None:
    """Have the model train only the word embeddings of `data_tokens` (tokens,), and of those that it needs
    itself, if it has a plain table for them, does not use it elsewhere, and gives the same output on short
    rows.

    To be called on all processes before the model is moved or wrapped; raises `UserError` if they would train
    different ones. The main process keeps what `with_all_words` needs."""
    _narrow(model, tokenizer, data_tokens, keep=hosts.is_main)
    hosts.check_same({"choice of word embeddings": trained_words_mark(model)})


def _narrow(model: Any, tokenizer: Any, data_tokens: np.ndarray, keep: bool) -> None:
    path, table = _plain_table(model)
    if table is None:
        return
    rows = short_rows(model, list(range(ROWS + 1)), PADDING, table.weight.device)
    own = [tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None), table.padding_idx]
    own += rows["input_ids"].unique().tolist()
    tokens = np.union1d(data_tokens, [token for token in own if token is not None]).astype(np.int64)
    # One that the table lacks is reported later (`check_tokens`).
    tokens = tokens[(tokens >= 0) & (tokens < table.num_embeddings)]
    if len(tokens) + 1 >= table.num_embeddings:
        return
    used = UsedWords(table, torch.from_numpy(tokens), keep)
    try:
        with torch.no_grad():
            before = evaluated_logits(model, rows)
        model.set_submodule(path, used)
        after = evaluated_logits(model, rows)
        (gradient,) = torch.autograd.grad(after.sum(), [used.weight], allow_unused=True)
        if torch.equal(before, after) and gradient is not None:
            return
    except Exception:  # of the model's own code, which may need more than texts, or the table's weights
        pass
    model.set_submodule(path, table)


def _plain_table(model: Any) -> tuple[str, nn.Embedding | None]:
    """The table of the word embeddings and its path; None if it is not a plain table, is not trained, or is
    used in several places."""
    table = word_embeddings(model)
    if type(table) is not nn.Embedding or not table.weight.requires_grad or has_lora(model):
        return "", None
    if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return "", None
    weights = model.named_parameters(remove_duplicate=False)
    paths = [name.removesuffix(".weight") for name, weight in weights if weight is table.weight]
    return (paths[0], table) if len(paths) == 1 else ("", None)


def word_embeddings(model: Any) -> Any:
    """The module of a model's word embeddings; None if there is no such module."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # CANINE makes them from hashes
        return None


def used_words(model: nn.Module) -> dict[str, UsedWords]:
    """The tables that `train_used_words` has put into a model, by the names of their weights."""
    return {
        f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, UsedWords)
    }


def trained_words_mark(model: nn.Module) -> list[str]:
    """How many tokens have trained rows in a model's table, with a hash of which; empty if it trains the
    whole table, or none of it."""
    tokens = [words.tokens for words in used_words(model).values()]
    return [f"{len(some):,} ({hashlib.sha256(some.numpy().tobytes()).hexdigest()[:12]})" for some in tokens]


def with_all_words(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the model, with whole tables."""
    return state | {name: words.table(state[name]) for name, words in used_words(model).items()}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of a model's parameters, with whole tables, and of those that are trained."""
    weights, tables = list(model.parameters()), used_words(model).values()
    left = sum(words.num_embeddings * words.embedding_dim - words.weight.numel() for words in tables)
    ones = sum(words.embedding_dim for words in tables)
    return left + sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad) - ones
