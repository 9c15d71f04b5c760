"""The moving average of the weights, by hand."""

import pytest
import torch

from ft.ema import averaged, keep_average


def optimizer_of(parameter):
    optimizer = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0, fused=True)
    keep_average(optimizer, 0.25)
    return optimizer


def step(optimizer, parameter, gradient):
    parameter.grad = torch.tensor([gradient])
    optimizer.step()
    return parameter.item()


def average(optimizer, parameter):
    with averaged(optimizer):
        return parameter.item()


def test_it_follows_the_weights_with_the_decay_and_its_warm_up():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = optimizer_of(parameter)
    assert average(optimizer, parameter) == 3.0  # before the first step there is none
    expected = first = step(optimizer, parameter, 1.0)
    assert average(optimizer, parameter) == first
    for n, gradient in enumerate((-2.0, 0.5, 4.0), start=2):
        weight = step(optimizer, parameter, gradient)
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
        assert average(optimizer, parameter) == pytest.approx(expected, rel=1e-6)
        assert parameter.item() == weight  # which is back outside


def test_a_step_that_changes_nothing_leaves_it_and_its_count_alone():
    parameters = [torch.nn.Parameter(torch.tensor([3.0])) for _ in range(2)]
    plain, skipping = map(optimizer_of, parameters)
    for gradient in (1.0, -2.0, 0.5):
        step(plain, parameters[0], gradient)
        step(skipping, parameters[1], gradient)
        skipping.found_inf = torch.ones(())
        step(skipping, parameters[1], float("nan"))
        skipping.found_inf = torch.zeros(())
    assert average(plain, parameters[0]) == average(skipping, parameters[1]) != parameters[0].item()


def test_it_begins_with_the_first_step_that_changes_something():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = optimizer_of(parameter)
    optimizer.found_inf = torch.ones(())
    step(optimizer, parameter, float("nan"))
    optimizer.found_inf = torch.zeros(())
    assert average(optimizer, parameter) == 3.0
    first = step(optimizer, parameter, 1.0)
    assert average(optimizer, parameter) == first != 3.0


def test_a_parameter_without_a_gradient_does_not_hold_its_count_up():
    first, second, alone = (torch.nn.Parameter(torch.tensor([3.0])) for _ in range(3))
    both, one = torch.optim.AdamW([first, second], lr=0.5, weight_decay=0.0, fused=True), optimizer_of(alone)
    keep_average(both, 0.25)
    first.grad = torch.tensor([1.0])
    for gradient in (1.0, -2.0, 0.5):
        step(both, second, gradient)
        step(one, alone, gradient)
        first.grad = None
    assert average(both, second) == average(one, alone) != alone.item()


def test_what_is_loaded_inside_becomes_the_average():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = optimizer_of(parameter)
    weight = step(optimizer, parameter, 1.0)
    with averaged(optimizer), torch.no_grad():
        parameter.fill_(7.0)
    assert parameter.item() == weight and average(optimizer, parameter) == 7.0


def test_it_goes_through_the_optimizers_state():
    parameter, other = (torch.nn.Parameter(torch.tensor([3.0])) for _ in range(2))
    one, two = optimizer_of(parameter), optimizer_of(other)
    for gradient in (1.0, -2.0):
        step(one, parameter, gradient)
    two.load_state_dict(one.state_dict())
    other.data.copy_(parameter.data)
    step(one, parameter, 0.5), step(two, other, 0.5)
    assert average(one, parameter) == average(two, other)
