"""Surprising behaviour of libraries that this code works around.

When one of these fails, a library has changed: read the test's docstring, and simplify or fix the place it
names.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ACCELERATE, TORCHRUN, forget_accelerator
from torch import nn


def new_accelerator():
    from ft.config import Config
    from ft.runtime import build_accelerator

    forget_accelerator()
    return build_accelerator(Config())


def run_script(tmp_path, command, text, **environment):
    """Really launch a script of a few lines."""
    script = tmp_path / "canary.py"
    script.write_text(text)
    env = {**os.environ, **environment}
    return subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        timeout=180,
        env=env,
        stdin=subprocess.DEVNULL,
    )


# --- Accelerate: what a prepared object does


def test_a_prepared_scheduler_steps_once_a_call_whatever_the_processes_and_skips_nothing(monkeypatch):
    """train.py steps it once per update, whether that took effect or not: ft.optim.Schedule itself counts
    those that did.

    If it steps four times, or skips a step by itself, step_scheduler_with_optimizer=False (ft/runtime.py)
    means something else now."""
    from accelerate.state import AcceleratorState, PartialState

    accelerator = new_accelerator()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 4)
    assert AcceleratorState().num_processes == 4
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.5]
    optimizer._is_overflow = True
    schedule.step()
    assert schedule.get_last_lr() == [0.25]


def test_backward_divides_by_nothing_even_if_the_environment_asks_for_accumulation(monkeypatch):
    """ft/runtime.py passes a plugin with one step, so that only the loop scales the loss. A launch config's
    gradient_accumulation_steps arrives through this variable and would silently rescale the loss."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones(1, requires_grad=True)
    new_accelerator().backward((3 * weight).sum())
    assert weight.grad.item() == 3


def test_accelerates_own_default_does_divide(monkeypatch):
    """The reason for the plugin above; if this changes, it can go."""
    from accelerate import Accelerator

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    forget_accelerator()
    weight = torch.ones(1, requires_grad=True)
    Accelerator(cpu=True).backward((3 * weight).sum())
    assert weight.grad.item() == 0.75


def test_the_fused_optimizer_divides_gradients_by_its_grad_scale():
    """ft.optim.clip_in_step relies on it."""
    weights = []
    for scale in (None, torch.tensor(4.0)):
        weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer = torch.optim.AdamW(
            [weight], lr=0.1, eps=1.0, fused=True
        )  # an eps with which the size matters
        optimizer.grad_scale = scale
        for gradient in ([1.0, -2.0], [0.5, 3.0]):
            weight.grad = torch.tensor(gradient) * (1 if scale is None else scale)
            optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights) and weights[0][0] != 3


# --- Accelerate: how batches reach the processes


class Batches:
    """A batch sampler like ours: no batch_size, no drop_last, batches that are not lists."""

    def __init__(self, count):
        self.batches = [("slot", number) for number in range(count)]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_any_kind_and_size_are_dealt_in_turn(processes):
    """ft/data/loader.py relies on batch i going, unchanged, to process i modulo the number of processes."""
    from accelerate.data_loader import BatchSamplerShard

    sampler = Batches(6)
    for rank in range(processes):
        shard = BatchSamplerShard(sampler, num_processes=processes, process_index=rank, even_batches=False)
        assert list(shard) == sampler.batches[rank::processes]


def test_a_prepared_loader_hands_batches_through_as_they_are():
    """ft/data/loader.py: __getitems__ makes the whole micro-batch, collate_fn does nothing."""
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __len__(self):
            return 6

        def __getitems__(self, slot):
            return {"slot": slot, "tensor": torch.tensor([slot[1]])}

    loader = DataLoader(Rows(), batch_sampler=Batches(6), collate_fn=lambda batch: batch)
    prepared = new_accelerator().prepare(loader)
    for _ in range(2):  # an epoch is a new pass over the same prepared loader
        assert [(batch["slot"][1], batch["tensor"].item()) for batch in prepared] == [
            (i, i) for i in range(6)
        ]


def test_a_batch_with_a_to_method_is_moved_by_it():
    """ft/data/loader.py's MicroBatch is not a dictionary; Accelerate and torch call its own methods."""
    from accelerate.utils import send_to_device

    from ft.data.loader import MicroBatch, Slot

    one = torch.ones(1)
    batch = MicroBatch({"input_ids": one}, one, one, one, Slot(np.zeros(1), 0))
    moved = send_to_device(batch, torch.device("meta"))
    assert isinstance(moved, MicroBatch) and moved.inputs["input_ids"].is_meta and moved.weights.is_meta


# --- Accelerate: launching

# A single write call, as processes share a pipe: print makes eight if PYTHONUNBUFFERED is set.
TELL = (
    "import os\nfrom accelerate import Accelerator\na = Accelerator(%s)\n"
    "os.write(1, f'I am {a.process_index} of {a.num_processes}\\n'.encode())\n"
)


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_cpu_and_num_processes_start_one_process_and_the_exit_code_is_lost(tmp_path, quiet):
    """ft/launch.py's asked_processes reads the launcher's command line because of the former; if two start
    now, it can go. The README says that `accelerate launch` turns every exit code except 0 into 1, and adds a
    traceback unless --quiet is given."""
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", *quiet]
    done = run_script(tmp_path, command, TELL % "" + "raise SystemExit(75)")
    assert done.stdout.splitlines() == ["I am 0 of 1"], done.stderr
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == (not quiet), done.stderr


AVERAGE = (
    "import torch\n"
    "model = a.prepare(torch.nn.Linear(1, 1, bias=False))\n"
    "model(torch.full((1, 1), 1.0 + a.process_index)).sum().backward()\n"
    "os.write(1, f'gradient {next(model.parameters()).grad.item()}\\n'.encode())\n"
)
LEAVE = "import torch\ntorch.distributed.is_initialized() and torch.distributed.barrier()\nos._exit(0)\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes with cpu=True: each reports its rank and its gradient of one weight."""
    text = TELL % "cpu=True" + AVERAGE + LEAVE
    return run_script(tmp_path_factory.mktemp("pair"), [*TORCHRUN, "2"], text)


def test_two_cpu_processes_find_each_other_only_with_cpu_true(tmp_path, pair):
    """ft/runtime.py passes cpu=True without an accelerator: otherwise each thinks that it is alone."""
    alone = run_script(tmp_path, [*TORCHRUN, "2"], TELL % "" + LEAVE)
    for done, world in ((pair, 2), (alone, 1)):
        assert done.stdout.count(f"of {world}") == 2, (done.stdout, done.stderr)


def test_ddp_averages_gradients_over_processes(pair):
    """train.py multiplies by the number of processes to undo it."""
    assert pair.stdout.count("gradient 1.5") == 2, pair.stderr


# --- Transformers


def seen_masks(folder, name, **options):
    """The attention masks that a model passes to an attention function registered as `name`."""
    from transformers import AttentionInterface, AutoModel

    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return value.transpose(1, 2), None

    AttentionInterface.register(name, spy)
    model = AutoModel.from_pretrained(folder)
    model.set_attn_implementation(name)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=mask)
    return seen


def test_an_attention_function_gets_a_mask_only_with_a_mask_function_of_its_name(tiny_model):
    """ft/attention.py registers both under one name. Without the second, padding is silently attended to."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert seen_masks(tiny_model, "canary_without")[0] is None
    AttentionMaskInterface.register("canary_with", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    mask = seen_masks(tiny_model, "canary_with")[0]
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 5, 5)
    assert mask[1, 0, 0].tolist() == [True, True, False, False, False]


def test_the_linear_schedule_reaches_zero_after_the_last_update():
    """ft/optim.py: update k (from 0) has the rate (total - k) / total; the last one still learns."""
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    rates = []
    for _ in range(5):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]


# --- torch


def test_fused_adamw_runs_on_a_cpu():
    """ft/optim.py always uses it."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    torch.optim.AdamW([parameter], fused=True).step()
    assert (parameter < 1).all()


def test_a_loader_hands_a_custom_batch_to_its_own_pin_memory():
    """ft/data/loader.py's MicroBatch.pin_memory; otherwise copies to a GPU would wait."""
    from torch.utils.data._utils.pin_memory import pin_memory

    class Batch:
        def pin_memory(self):
            return "pinned"

    assert pin_memory(Batch()) == "pinned"


# --- datasets


def test_a_shuffled_selection_is_numpys_permutation():
    """ft/data/split.py's sample draws the rows that the tutorials draw, without importing datasets."""
    from datasets import Dataset

    from ft.data.split import sample

    rows = Dataset.from_dict({"row": range(50)}).shuffle(seed=42).select(range(20))["row"]
    assert list(rows) == sample(50, 20).tolist()


# --- W&B


def test_accelerates_wandb_tracker_hands_the_step_on():
    """ft/tracking.py omits step= only for W&B, which drops rows whose step goes back."""
    pytest.importorskip("wandb")
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=True)  # its logger needs it
    calls = []
    tracker = WandBTracker("project")
    tracker.run = type("Run", (), {"log": lambda self, values, step=None: calls.append(step)})()
    tracker.log({"a": 1}, step=7)
    tracker.log({"a": 1})
    assert calls == [7, None]


def test_wandb_says_without_asking_whether_there_is_a_key(tmp_path):
    """ft/wandb_run.py calls login(prompt=False), which exists since 0.30."""
    pytest.importorskip("wandb")
    text = "import wandb\nprint('key:', wandb.login(prompt=False, verify=False))\n"
    done = run_script(tmp_path, [sys.executable], text, HOME=str(tmp_path))
    assert "key: False" in done.stdout, done.stderr
