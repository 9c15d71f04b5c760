"""Processes that exchange the met rows of a table have the gradient that DDP gives; what DDP is told."""

import os
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import spawn

from ft.ddp import exchange_met_rows, keep_from_ddp, prepare_for_ddp, uses_all_weights


class Embedder(torch.nn.Module):
    """Words in, scores of words out, from one table; some of its weights are never used."""

    def __init__(self, spare=False):
        super().__init__()
        self.words, self.inner = torch.nn.Embedding(40, 4), torch.nn.Linear(4, 4)
        self.outer = torch.nn.Linear(4, 40)
        self.outer.weight = self.words.weight
        self.spare = torch.nn.Parameter(torch.ones(2)) if spare else None

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None):
        return self.outer(self.inner(self.words(input_ids)))


def embed_on_both(rank, folder):
    """One of two processes that meet other words, and some the same; writes the gradients."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(rank)  # unlike tables: that of rank 0 counts
    model = Embedder()
    for name, table in {"rows": keep_from_ddp(model), "table": None}.items():
        if name == "table":
            assert model._ddp_params_and_buffers_to_ignore == ["words.weight", "outer.weight"]
            del model._ddp_params_and_buffers_to_ignore
        ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for micro_batch, words in enumerate(([1, 2, 2, 3 + rank], [1, 9 - rank])):
            with nullcontext() if micro_batch else ddp.no_sync():
                # Of the other use of the table, the words 2 and 39.
                ddp(torch.tensor(words))[:, [2, 39]].pow(2).sum().backward()
        exchange_met_rows(table)
        torch.save([p.grad.clone() for p in model.parameters()], f"{folder}/{name}_{rank}.pt")
        ddp.zero_grad()
    torch.distributed.barrier()
    os._exit(0)  # as runs do: gloo's threads may abort a process that ends in the ordinary way


def test_processes_that_exchange_rows_have_the_gradient_that_ddp_gives(tmp_path):
    context, deadline = spawn(embed_on_both, (tmp_path,), nprocs=2, join=False), time.monotonic() + 120
    try:
        while not context.join(timeout=max(0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "hung"
    finally:
        for process in context.processes:
            process.kill()
    expected = torch.load(tmp_path / "table_0.pt")
    assert expected[0].any(dim=1).nonzero().flatten().tolist() == [1, 2, 3, 4, 8, 9, 39]
    for rank in range(2):
        for found, right in zip(torch.load(tmp_path / f"rows_{rank}.pt"), expected, strict=True):
            assert torch.equal(found, right)


@pytest.fixture
def gloo():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def prepared(model, **options):
    two = {"num_processes": 2, "is_fsdp2": False, "ddp_handler": SimpleNamespace()}
    return prepare_for_ddp(model, SimpleNamespace(**two | options))


@pytest.mark.usefixtures("gloo")
def test_the_words_are_kept_from_ddp_where_they_are_trained():
    model = Embedder()
    assert prepared(model, is_fsdp2=True) is None
    assert prepared(model, num_processes=1) is None, "nobody to exchange rows with"
    assert prepared(model) is model.words.weight
    model.inner.requires_grad_(False)
    model.outer.bias.requires_grad_(False)
    assert prepared(model) is None, "DDP would have nothing to do, which it refuses"
    model.inner.requires_grad_(True)
    model.words.requires_grad_(False)
    assert prepared(model) is None


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("spare", [False, True])
def test_ddp_searches_for_weights_without_a_gradient_only_where_there_are_some(spare, processes):
    model, handler = Embedder(spare), SimpleNamespace()
    state = torch.get_rng_state()
    prepared(model, ddp_handler=handler, num_processes=processes)
    assert handler.find_unused_parameters == spare
    assert model.training and torch.equal(state, torch.get_rng_state())
    if spare:
        model.spare.requires_grad_(False)
        assert uses_all_weights(model)
