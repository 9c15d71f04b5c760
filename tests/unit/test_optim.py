"""A skipped update changes nothing, and who skipped it is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

from ft.attempts import MAX_SKIPPED, Attempts
from ft.checkpoint import restore, snapshot, write_checkpoint
from ft.config import Config
from ft.errors import UserError
from ft.health import spread_nonfinite
from ft.optim import build_optimizer, build_scheduler, clip_in_step, total_norm


@pytest.fixture(autouse=True)
def _accelerator():
    Accelerator(cpu=True)  # the wrappers need its state


@pytest.fixture
def trained():
    """A model, its prepared optimizer and schedule, and a function that makes an update with a loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    plain = build_optimizer(model, Config())
    optimizer = AcceleratedOptimizer(plain, device_placement=False)
    schedule = AcceleratedScheduler(build_scheduler(plain, Config(), 10), optimizer, False)

    def update(add=0.0):
        loss = model(torch.ones(1, 3)).pow(2).sum() + add
        spread_nonfinite(loss)
        loss.backward()
        clip_in_step(optimizer, model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return model, optimizer, schedule, update


def all_of(model, optimizer, schedule):
    state = optimizer.state_dict()["state"]
    tensors = [*model.parameters(), *(value for entry in state.values() for value in entry.values())]
    return [tensor.detach().clone() for tensor in tensors], float(schedule.get_last_lr()[0])


def test_adamw_has_the_numbers_of_the_options():
    config = Config(learning_rate=3e-4, weight_decay=0.03, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
    known = build_optimizer(torch.nn.Linear(2, 2), config).defaults
    assert (known["lr"], known["betas"], known["eps"]) == (3e-4, (0.8, 0.95), 1e-5)


@pytest.mark.parametrize(("max_norm", "limit"), [(1.0, 1.0), (1e6, 1e6), (0.0, math.inf), (None, math.inf)])
def test_gradients_are_clipped_in_the_step_as_torch_clips_them_before(max_norm, limit):
    models = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        plain = build_optimizer(model, Config(adam_epsilon=1.0))  # with which the size of a gradient matters
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
    """If torch's own becomes right, `total_norm` can go."""
    torch.manual_seed(0)
    gradients = [torch.randn(30_000, 384), torch.randn(384), torch.randn(8, 3, 5), torch.tensor(2.0)]
    right = math.sqrt(sum(gradient.double().pow(2).sum() for gradient in gradients))
    assert float(total_norm(gradients)) == pytest.approx(right, rel=1e-6)
    assert float(torch.nn.utils.get_total_norm(gradients)) != pytest.approx(right, rel=1e-5)
    assert total_norm([]) == 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradient_is_finite(trained, value):
    """Adding an infinity to a loss leaves its gradient unchanged."""
    model, optimizer, schedule, update = trained
    update()
    update()
    weights, rate = all_of(model, optimizer, schedule)
    update(add=value)
    after, rate_after = all_of(model, optimizer, schedule)
    assert all(map(torch.equal, weights, after)) and rate_after == rate < Config().learning_rate
    update()
    after, rate_after = all_of(model, optimizer, schedule)
    assert not any(map(torch.equal, weights, after)) and rate_after < rate


def test_a_schedule_goes_on_where_a_restored_optimizer_stands(trained):
    model, optimizer, schedule, update = trained
    for add in (0.0, float("inf"), 0.0):
        update(add)
    kept, rate = optimizer.state_dict(), float(schedule.get_last_lr()[0])
    plain = build_optimizer(model, Config())
    fresh = build_scheduler(plain, Config(), 10)
    plain.load_state_dict(kept)
    fresh.load_state_dict(schedule.state_dict())
    assert float(fresh.get_last_lr()[0]) == rate == pytest.approx(Config().learning_rate * 0.8)
    longer = build_scheduler(plain, Config(), 20)  # the run was given more updates
    assert float(longer.get_last_lr()[0]) == pytest.approx(Config().learning_rate * 0.9)


@pytest.fixture
def scaled():
    """A model, its optimizer prepared for fp16 (the scaler runs on a CPU, too), and what Attempts needs."""
    model = torch.nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(build_optimizer(model, Config()), device_placement=False, scaler=scaler)

    def update(gradient):
        scaler.scale(model(torch.ones(1, 3)).sum() * gradient).backward()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.optimizer_step_was_skipped = optimizer.step_was_skipped

    accelerator = SimpleNamespace(scaler=scaler, num_processes=1, optimizer_step_was_skipped=False)
    return model, optimizer, accelerator, update


def test_accelerate_knows_of_a_step_that_the_scaler_skipped(scaled):
    """It checks whether the optimizer was called; a fused one would be, and would skip by itself."""
    model, optimizer, _, update = scaled
    before = model.weight.detach().clone()
    update(gradient=float("inf"))
    assert optimizer.step_was_skipped and torch.equal(before, model.weight)
    update(gradient=1.0)
    assert not optimizer.step_was_skipped and not torch.equal(before, model.weight)


def test_a_checkpoint_holds_the_scale_of_fp16(scaled, tmp_path):
    """A resumed run would begin with the first one, and skip again what it had come down by."""
    model, optimizer, accelerator, update = scaled
    accelerator.is_main_process, accelerator.is_fsdp2 = True, False
    accelerator.unwrap_model = lambda model: model
    schedule = build_scheduler(optimizer.optimizer, Config(), 10)
    for gradient in (1.0, float("inf"), 1.0):
        update(gradient)
    state, held = snapshot(accelerator, model, optimizer, schedule), accelerator.scaler.state_dict()
    assert held["scale"] == 2.0**15
    write_checkpoint(tmp_path, state, {"step": 3, "best_step": 0}, {}, 10, None)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    restore(tmp_path / "step-00000003", accelerator, model, optimizer, schedule)
    assert accelerator.scaler.state_dict() == held


def test_out_of_memory_in_the_step_is_not_tried_again(scaled):
    """Some parameters may have been updated, and would be updated again."""
    model, optimizer, accelerator, _ = scaled
    (batch,) = [SimpleNamespace(slot=SimpleNamespace(is_last=True), row_ids=[0, 1])]
    with pytest.raises(UserError, match=r"out of memory in the optimizer step.*lora_rank, freeze"):
        for attempt in Attempts(accelerator, optimizer, model).at([batch]):
            with attempt:
                for _ in attempt:
                    pass
                raise torch.OutOfMemoryError


def test_an_update_that_no_scale_can_mend_leaves_the_scale_as_it_was(scaled):
    """After forty halvings it would be next to nothing, and later gradients zero."""
    model, optimizer, accelerator, update = scaled
    tried = 0
    for attempt in Attempts(accelerator, optimizer, model).at([]):
        with attempt:
            update(gradient=float("nan"))
        tried += 1
    assert tried == MAX_SKIPPED and accelerator.scaler.get_scale() == 2.0**16
