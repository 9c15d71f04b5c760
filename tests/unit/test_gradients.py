"""Gradients are clipped as torch clips them, their norm is right, and rows of embeddings go as rows."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from ft.config import Config
from ft.gradients import clip_in_step, exchange_met_rows, total_norm
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


def test_an_update_of_rows_is_that_of_the_table():
    """A word that comes twice, rows that were met before, and rows that never were."""
    ids = torch.tensor([[1, 2, 2, 3], [5, 1, 4, 4]])
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(9, 4, sparse=sparse), torch.nn.Linear(4, 2))
        plain = build_optimizer(model, Config(weight_decay=0.1, learning_rate=0.1))
        optimizer, norms = AcceleratedOptimizer(plain, device_placement=False), []
        for update in range(3):
            model(ids + update % 2).pow(2).sum().backward()
            assert model[0].weight.grad.is_sparse == sparse
            norms.append(clip_in_step(optimizer, model.parameters(), 0.5))
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([torch.stack(norms), *(p.flatten() for p in model.parameters())]))
    assert torch.allclose(*found, rtol=1e-6, atol=1e-7)


@pytest.fixture
def gloo():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def classifier(kind, **options):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(kind, vocab_size=40, num_labels=3, **options)
    return AutoModelForSequenceClassification.from_config(config)


BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


def exchanges_rows(model, is_fsdp2=False):
    exchange_met_rows(model, SimpleNamespace(is_fsdp2=is_fsdp2))
    return model.get_input_embeddings().sparse


@pytest.mark.usefixtures("gloo")
def test_rows_are_exchanged_where_autograd_gives_them_as_rows():
    assert exchanges_rows(classifier("bert", **BERT))
    assert exchanges_rows(classifier("modernbert", **BERT, pad_token_id=0))
    assert not exchanges_rows(classifier("bart", **BART)), "one table in three places"
    assert not exchanges_rows(classifier("bert", **BERT), is_fsdp2=True)
    frozen = classifier("bert", **BERT)
    frozen.get_input_embeddings().requires_grad_(False)
    assert not exchanges_rows(frozen)
    of_ones_own = classifier("bert", **BERT)
    of_ones_own.__class__ = type("OfOnesOwn", (type(of_ones_own),), {})
    assert not exchanges_rows(of_ones_own), "may use the table in another way, too"


def test_one_process_has_no_rows_to_exchange():
    assert not exchanges_rows(classifier("bert", **BERT))
