"""Gradients are clipped as torch clips them, their norm is right, and met rows are exchanged as by DDP."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from ft.config import Config
from ft.gradients import clip_in_step, exchange_met_rows, keep_from_ddp, total_norm
from ft.optim import build_optimizer


@pytest.fixture(autouse=True)
def _accelerator():
    Accelerator(cpu=True)  # the wrappers ask for its state


@pytest.mark.parametrize(("max_norm", "limit"), [(1.0, 1.0), (1e6, 1e6), (0.0, math.inf), (None, math.inf)])
def test_gradients_are_clipped_in_the_step_as_torch_clips_them_before(max_norm, limit):
    models = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        plain = build_optimizer(model, Config(adam_epsilon=1.0))  # by which the size of a gradient counts
        optimizer = AcceleratedOptimizer(plain, device_placement=False)
        for _ in range(3):
            model(torch.ones(1, 3) * 9).pow(2).sum().backward()
            if ours:
                norm = clip_in_step(optimizer, model.parameters(), max_norm)
            else:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad()
        models.append((torch.cat([p.flatten() for p in model.parameters()]), norm))
    (weights, norm), (expected, expected_norm) = models
    assert torch.allclose(weights, expected, rtol=1e-6, atol=0)
    assert 10 < norm and float(norm) == pytest.approx(float(expected_norm))


def test_the_norm_is_right_to_the_last_digits_of_fp32_where_torch_is_not():
    """If torch's own gets right, `total_norm` may go."""
    torch.manual_seed(0)
    gradients = [torch.randn(30_000, 384), torch.randn(384), torch.randn(8, 3, 5), torch.tensor(2.0)]
    right = math.sqrt(sum(gradient.double().pow(2).sum() for gradient in gradients))
    assert float(total_norm(gradients)) == pytest.approx(right, rel=1e-6)
    assert float(torch.nn.utils.get_total_norm(gradients)) != pytest.approx(right, rel=1e-5)
    assert total_norm([]) == 0


def embed_on_both(rank, folder):
    """One of two processes that meet other words of a tied table, some of them both; writes the gradient."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # unlike tables: that of rank 0 counts
    model = torch.nn.Sequential(torch.nn.Embedding(40, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 40))
    model[2].weight = model[0].weight
    for name, taken in {"rows": keep_from_ddp(model, SimpleNamespace(is_fsdp2=False)), "table": None}.items():
        if name == "table":
            assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "2.weight"]
            del model._ddp_params_and_buffers_to_ignore
        ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for micro_batch, words in enumerate(([1, 2, 2, 3 + rank], [1, 9 - rank])):
            with nullcontext() if micro_batch else ddp.no_sync():
                # Of the other use of the table, the words 2 and 39.
                ddp(torch.tensor(words))[:, [2, 39]].pow(2).sum().backward()
        exchange_met_rows(taken)
        torch.save([p.grad.clone() for p in model.parameters()], f"{folder}/{name}_{rank}.pt")
        ddp.zero_grad()
    torch.distributed.destroy_process_group()


def test_processes_that_exchange_rows_have_the_gradient_that_ddp_gives(tmp_path):
    torch.multiprocessing.spawn(embed_on_both, (tmp_path,), nprocs=2)
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


def kept_from_ddp(model, is_fsdp2=False):
    return keep_from_ddp(model, SimpleNamespace(is_fsdp2=is_fsdp2))


def embedder():
    return torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Embedding(20, 4), torch.nn.Linear(4, 2))


@pytest.mark.usefixtures("gloo")
def test_the_largest_table_that_is_trained_is_kept_from_ddp():
    model = embedder()
    assert kept_from_ddp(model, is_fsdp2=True) is None
    assert kept_from_ddp(model) is model[1].weight
    model[1].requires_grad_(False)
    assert kept_from_ddp(model) is model[0].weight
    model[2].requires_grad_(False)
    assert kept_from_ddp(model) is None, "DDP would have nothing to do, which it refuses"
    assert kept_from_ddp(torch.nn.Linear(4, 2)) is None


def test_one_process_has_no_rows_to_exchange():
    assert kept_from_ddp(embedder()) is None
    exchange_met_rows(None)
