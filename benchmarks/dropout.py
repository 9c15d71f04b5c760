"""Seconds of row-keyed dropout, forward and backward, against torch's own."""

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import at_least, gemm_peak, in_turn, median, save, spread, table

ROWS, HEADS, SIZE, RATE = 32, 12, 32, 0.1  # MiniLM's at the batch of the other commands
LENGTHS = (24, 80, 256)  # tokens per row: sst2, clothing_reviews, long
QUICK = {"rounds": 3}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--rounds", type=at_least(1), default=15)


def run(options: argparse.Namespace) -> None:
    """The hidden states and the attention of one layer, both arms in turn, round by round, after one that
    does not count."""
    measured: dict[str, dict[str, list[float]]] = {}
    gemm = [gemm_peak()]
    for length in LENGTHS:
        for place, arms in {"hidden": _hidden(length), "attention": _attention(length)}.items():
            seconds = measured[f"{place}, {length} tokens"] = {name: [] for name in arms}
            for number in range(options.rounds + 1):
                for name in in_turn(list(arms), number):
                    begin = time.perf_counter()
                    arms[name](number)
                    if number:
                        seconds[name].append(time.perf_counter() - begin)
    save(options, _text(measured), measured, [*gemm, gemm_peak()])


def _hidden(length: int) -> dict[str, Callable[[int], Any]]:
    import torch

    from ft.dropout import RowKeyedDropout, RowKeys

    rows = RowKeys(42)
    x = torch.randn(ROWS, length, HEADS * SIZE, requires_grad=True)
    keyed, plain = RowKeyedDropout(RATE, 0, rows), torch.nn.Dropout(RATE)

    def ours(update: int) -> None:
        rows.set(update, torch.arange(ROWS))
        keyed(x).backward(x.detach())

    return {"torch": lambda _: plain(x).backward(x.detach()), "row-keyed": ours}


def _attention(length: int) -> dict[str, Callable[[int], Any]]:
    """The attention of one layer, as Transformers calls it: torch's own function, and ours."""
    import torch
    from transformers import BertConfig, BertModel

    from ft.attention import install_attention
    from ft.dropout import RowKeys, install

    def model() -> Any:
        size = HEADS * SIZE
        config = BertConfig(
            vocab_size=9, hidden_size=size, num_hidden_layers=1, num_attention_heads=HEADS,
            intermediate_size=size, attention_probs_dropout_prob=RATE,
        )  # fmt: skip
        return BertModel(config).train()

    rows, plain, keyed = RowKeys(42), model(), model()
    install_attention(keyed, rows)
    install(keyed, rows)
    x = torch.randn(ROWS, length, HEADS * SIZE, requires_grad=True)

    def once(network: Any) -> None:
        network.encoder.layer[0].attention.self(x)[0].backward(x.detach())

    def ours(update: int) -> None:
        rows.set(update, torch.arange(ROWS))
        once(keyed)

    return {"torch": lambda _: once(plain), "row-keyed": ours}


def _text(measured: dict[str, dict[str, list[float]]]) -> str:
    lines = []
    for name, arms in measured.items():
        ratios = [a / b for a, b in zip(arms["torch"], arms["row-keyed"], strict=True)]
        lines.append(
            [name, *(f"{1000 * median(arms[arm]):.2f}" for arm in ("torch", "row-keyed")),
             f"{median(ratios):.2f}", spread(ratios, 2)]
        )  # fmt: skip
    header = ["milliseconds", "torch", "row-keyed", "torch / row-keyed", "lowest to highest"]
    return (
        f"{table(header, lines)}\n\nMedians of {len(ratios)} rounds in turn; {ROWS} rows, {HEADS} heads of "
        f"{SIZE}, rate {RATE}. The attention is that of one layer, with its projections."
    )
