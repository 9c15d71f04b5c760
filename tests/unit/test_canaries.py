"""Surprises of the libraries that this code is built around.

When one of these fails, the library has changed: read what the test says, and simplify or mend the place it
names."""

import os
import subprocess

import numpy as np
import pytest
import torch
from conftest import TORCHRUN


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    from ft.config import Config
    from ft.runtime import build_accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return build_accelerator(Config())


def test_a_prepared_scheduler_steps_once_a_call_and_skips_nothing(accelerator):
    """train.py steps it once an update, and only after a step that was not skipped."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    optimizer._is_overflow = True
    schedule.step()
    assert schedule.get_last_lr() == [0.5]


def test_backward_divides_by_nothing_even_if_the_environment_asks_for_accumulation(monkeypatch):
    """runtime.build_accelerator passes a plugin of one step, so that the loop alone scales the loss."""
    from accelerate.state import AcceleratorState, GradientState

    from ft.config import Config
    from ft.runtime import build_accelerator

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    weight = torch.ones(1, requires_grad=True)
    build_accelerator(Config()).backward((3 * weight).sum())
    assert weight.grad.item() == 3


def test_batches_of_any_kind_and_size_are_dealt_in_turn():
    """data/loader.py relies on batch i going to process i modulo the number of processes, as it is."""
    from accelerate.data_loader import BatchSamplerShard

    batches = [("slot", number) for number in range(6)]
    for rank in range(3):
        shard = BatchSamplerShard(batches, num_processes=3, process_index=rank, even_batches=False)
        assert list(shard) == batches[rank::3]


def test_a_batch_with_a_to_method_is_moved_by_it():
    """data/loader.py's MicroBatch is no dictionary; Accelerate and torch call its own methods."""
    from accelerate.utils import send_to_device

    from ft.data.loader import MicroBatch, Slot

    one = torch.ones(1)
    batch = MicroBatch({"input_ids": one}, one, one, one, Slot(np.zeros(1), 0))
    moved = send_to_device(batch, torch.device("meta"))
    assert isinstance(moved, MicroBatch) and moved.inputs["input_ids"].is_meta and moved.weights.is_meta


def test_an_attention_function_without_a_mask_function_gets_no_mask(tiny_model):
    """dropout.py registers both under one name."""
    from transformers import AttentionInterface, AutoModel

    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return value.transpose(1, 2), None

    AttentionInterface.register("canary", spy)
    model = AutoModel.from_pretrained(tiny_model)
    model.set_attn_implementation("canary")
    ids = torch.ones(2, 5, dtype=torch.long)
    model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    assert seen[0] is None


def test_fused_adamw_runs_on_a_cpu():
    """optim.py always asks for it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    torch.optim.AdamW([parameter], fused=True).step()
    assert (parameter < 1).all()


def test_ddp_averages_gradients_over_processes(tmp_path):
    """train.py multiplies by the number of processes to undo it."""
    script = tmp_path / "average.py"
    script.write_text(
        "import os, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True)\n"
        "model = accelerator.prepare(torch.nn.Linear(1, 1, bias=False))\n"
        "model(torch.full((1, 1), 1.0 + accelerator.process_index)).sum().backward()\n"
        "os.write(1, f'gradient {next(model.parameters()).grad.item()}\\n'.encode())\n"
        "torch.distributed.barrier()\n"
        "os._exit(0)\n"
    )
    command = [*TORCHRUN, "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.count("gradient 1.5") == 2, done.stderr
