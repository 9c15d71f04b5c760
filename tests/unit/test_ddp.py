"""Gradients exchanged without DDP equal those of DDP; what DDP is told."""

import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import spawn

import ft.ddp
from ft.ddp import exchange_used_rows, nothing_to_exchange, prepare_for_ddp, uses_all_weights
from ft.errors import UserError
from ft.hosts import HostGroup
from ft.shared_gradients import SharedGradients, shared_memory


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


def mean_gradients(model, rank, exchange=None):
    """The gradients of two updates of two micro-batches each; each process has different words."""
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    found = []
    # The last gradient of a backward pass comes late on one process.
    model.words.weight.register_hook(lambda gradient: time.sleep(0.1 * rank))
    for update in range(2):
        for micro_batch, words in enumerate(([1, 2, 2, 3 + rank], [1, 9 - rank - update])):
            with nullcontext() if micro_batch else ddp.no_sync():
                # From the other use of the table, the words 2 and 39.
                ddp(torch.tensor(words))[:, [2, 39]].pow(2).sum().backward()
        if exchange is not None:
            exchange()
        found += [p.grad.clone() for p in model.parameters()]
        time.sleep(0.1 * rank)
        ddp.zero_grad()
    return found


def join(rank, folder, processes):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes,
        timeout=timedelta(seconds=60),
    )  # fmt: skip


def embed_on_each(rank, folder, processes):
    """One of the processes; writes the gradients that result from each way to exchange them."""
    join(rank, folder, processes)
    barrier, found = torch.distributed.barrier, {}

    def late_after_a_barrier():
        barrier()
        time.sleep(0.1 * rank)

    for name in ("ddp", "rows", "memory"):
        torch.manual_seed(rank)  # different weights: those of rank 0 count
        model, exchange = Embedder(), None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "barrier", late_after_a_barrier)
            if name == "rows":
                patch.setattr(ft.ddp, "shared_memory", lambda *asked: None)
            if name != "ddp":
                asked = {"num_processes": processes, "is_main_process": rank == 0, "process_index": rank}
                exchange = prepared(model, **asked)
                rest = {"inner.weight", "outer.bias"} if name == "memory" else set()
                kept = {"words.weight", "outer.weight"} | rest
                assert set(model._ddp_params_and_buffers_to_ignore) == kept
            found[name] = mean_gradients(model, rank, exchange)
    torch.save(found, f"{folder}/{rank}.pt")
    barrier()
    os._exit(0)  # as runs do: gloo's threads may abort a process that exits in the ordinary way


def spawned(function, folder, processes):
    context = spawn(function, (folder, processes), nprocs=processes, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=max(0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "hung"
    finally:
        for process in context.processes:
            process.kill()


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux alone")


@on_linux
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_the_gradient_that_ddp_gives_however_they_exchange_it(tmp_path, processes):
    spawned(embed_on_each, tmp_path, processes)
    expected = torch.load(tmp_path / "0.pt")["ddp"]
    met = [1, 2, 3, 4, 8, 9, 39] if processes == 2 else [1, 2, 3, 4, 5, 7, 8, 9, 39]
    assert expected[0].any(dim=1).nonzero().flatten().tolist() == met
    for rank in range(processes):
        ways = torch.load(tmp_path / f"{rank}.pt")
        for name, found in ways.items():
            for one, right in zip(found, expected, strict=True):
                # One third is not exact.
                assert torch.equal(one, right) if processes == 2 else torch.allclose(one, right), name


def ask_for_memory(rank, folder, processes):
    """One of two processes, of which one cannot create, or cannot find, the memory that they are to share."""
    join(rank, folder, processes)
    hosts = HostGroup(SimpleNamespace(num_processes=2, is_main_process=rank == 0, process_index=rank))
    memory = shared_memory(3, 1000, hosts)
    memory[rank] = rank + 1.0
    torch.distributed.barrier()
    assert memory.mean(dim=1).tolist() == [1, 2, 0]
    whole, make = os.readlink, os.memfd_create
    if rank == 1:  # it sees other processes under the same ids
        os.readlink = lambda path: "/memfd:another (deleted)"
    assert shared_memory(3, 1000, hosts) is None
    os.readlink = whole
    if rank == 0:  # as on systems other than Linux
        del os.memfd_create
    assert shared_memory(3, 1000, hosts) is None
    os.memfd_create = make
    files = [os.readlink(place.path) for place in os.scandir("/proc/self/fd") if os.path.islink(place.path)]
    assert not any("memfd" in file for file in files)
    torch.distributed.barrier()
    os._exit(0)


@on_linux
def test_memory_is_shared_by_all_processes_or_by_none(tmp_path):
    spawned(ask_for_memory, tmp_path, 2)


def test_a_weight_without_a_gradient_ends_the_run():
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in ("met", "left")}
    gradients = SharedGradients(weights, torch.zeros(1, 4), rank=0)
    weights["met"].grad = torch.ones(2)
    with pytest.raises(UserError, match="left: has no gradient in this update"):
        gradients.exchange()


@pytest.fixture
def gloo():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def prepared(model, **options):
    two = {
        "num_processes": 2, "is_main_process": True, "process_index": 0,
        "is_fsdp2": False, "ddp_handler": SimpleNamespace(),
    }  # fmt: skip
    accelerator = SimpleNamespace(**two | options)
    return prepare_for_ddp(model, accelerator, HostGroup(accelerator))


@pytest.fixture
def apart(monkeypatch):
    """Processes on several hosts."""
    monkeypatch.setattr(ft.ddp, "shared_memory", lambda *asked: None)


@pytest.mark.usefixtures("gloo", "apart")
def test_the_words_are_kept_from_ddp_where_they_are_trained():
    model = Embedder()
    assert prepared(model, is_fsdp2=True) is nothing_to_exchange
    assert prepared(model, num_processes=1) is nothing_to_exchange
    rows = prepared(model)
    assert rows.func is exchange_used_rows and rows.args[0] is model.words.weight
    model.inner.requires_grad_(False)
    model.outer.bias.requires_grad_(False)
    assert prepared(model) is nothing_to_exchange, "DDP would have nothing to do, which it refuses"
    model.inner.requires_grad_(True)
    model.words.requires_grad_(False)
    assert prepared(model) is nothing_to_exchange


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("what", ["never used", "bf16", "transposed"])
def test_ddp_has_gradients_that_may_be_missing_or_lie_in_another_way(monkeypatch, what):
    monkeypatch.setattr(ft.ddp, "shared_memory", lambda *asked: pytest.fail("asked for"))
    model = Embedder(spare=what == "never used")
    if what == "bf16":
        model.inner.to(torch.bfloat16)
    if what == "transposed":
        model.inner.weight = torch.nn.Parameter(model.inner.weight.detach().t())
    assert prepared(model).func is exchange_used_rows


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
