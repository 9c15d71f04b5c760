"""The batch size means the same on any launch; mistakes are noticed; seeds leave nothing to restore."""

import errno
import io
import os
import random
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, forget_accelerator
from prepared import Prepared

from ft import report, tracking
from ft.config import Config, EvalConfig
from ft.data.loader import EvaluationSampler, MicroBatch, RowDataset, build_loader
from ft.errors import UserError
from ft.optim import build_optimizer, build_scheduler
from ft.report import described_update, evaluation_notes
from ft.runtime import build_accelerator, reseed, resolve_batch_size, run_script, total_updates


def resolved(processes, **values):
    config = Config(**values)
    notes = resolve_batch_size(config, processes)
    assert config.gradient_accumulation_steps is None  # derived from here on, on any launch
    return config.global_batch_size, config.per_device_train_batch_size, notes


@pytest.mark.parametrize("processes", [1, 3])
def test_without_a_word_the_global_batch_is_32(processes):
    assert resolved(processes) == (32, None, [])


def test_a_bound_on_the_micro_batch_does_not_change_the_global_batch():
    size, bound, notes = resolved(2, per_device_train_batch_size=4)
    assert (size, bound) == (32, 4) and "32" in notes[0]
    assert resolved(2, global_batch_size=48, per_device_train_batch_size=4) == (48, 4, [])


def test_micro_batch_times_accumulation_times_processes_is_the_global_batch_and_it_is_said():
    size, bound, notes = resolved(2, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert (size, bound) == (24, 4)
    assert "4 rows x 3 accumulation steps x 2 processes" in notes[0] and "global_batch_size: 24" in notes[0]


def test_accumulation_alone_bounds_the_micro_batch():
    assert resolved(2, global_batch_size=32, gradient_accumulation_steps=4)[:2] == (32, 4)


def test_three_numbers_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match=r"takes 4 accumulation steps.*is 2"):
        resolved(2, global_batch_size=64, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert (
        resolved(2, global_batch_size=32, per_device_train_batch_size=8, gradient_accumulation_steps=2)[0]
        == 32
    )


@pytest.mark.parametrize(
    "rows, processes, most, said",
    [
        (32, 1, 32, "global batch 32 = 1 process x 32 rows x 1 accumulation step"),
        (10, 1, 4, "global batch 10 <= 1 process x 4 rows x 3 accumulation steps"),
        (32, 3, 32, "global batch 32 <= 3 processes x 11 rows x 1 accumulation step"),
        (2, 4, 2, "global batch 2 <= 4 processes x 1 row x 1 accumulation step"),
    ],
)
def test_the_summary_says_no_more_of_an_update_than_is_true(rows, processes, most, said):
    assert described_update(rows, processes, most) == said


@pytest.mark.parametrize("offline", ["1", "0"])
def test_the_hugging_face_libraries_count_nothing_and_are_offline_together(offline):
    """By default, `datasets` and `evaluate` tell Amazon's S3 which data and metrics are loaded."""
    script = (
        "from types import SimpleNamespace; from ft.runtime import set_environment; "
        "set_environment(SimpleNamespace(deterministic=False)); import datasets, evaluate; "
        "print(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, evaluate.config.HF_UPDATE_DOWNLOAD_COUNTS, "
        "evaluate.config.HF_EVALUATE_OFFLINE)"
    )
    known = ("HF_UPDATE_DOWNLOAD_COUNTS", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
    words = {name: value for name, value in os.environ.items() if name not in known}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**words, "HF_HUB_OFFLINE": offline}, text=True, cwd=ROOT,
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "False", str(offline == "1")]


def test_an_evaluation_needs_no_tracker_of_its_run(monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", lambda name: False)
    forget_accelerator()
    assert build_accelerator(EvalConfig(report_to="wandb")).log_with == []
    with pytest.raises(UserError, match="report_to: wandb is not installed"):
        build_accelerator(Config(report_to="wandb"))


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_alone_says_how_a_gpu_multiplies_fp32(tf32):
    forget_accelerator()
    build_accelerator(Config(tf32=tf32))
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
    code = {path.name: path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("ft/**/*.py"))}
    setting = re.compile("allow_tf32|matmul_precision|fp32_precision")
    assert [name for name, text in code.items() if setting.search(text)] == ["runtime.py"]


def test_a_gpu_that_cannot_sum_in_64_bits_is_left_alone(monkeypatch):
    """Here Accelerate would take the CPU in any case: the test checks what it is asked for."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    made = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("accelerate.Accelerator", made)
    with pytest.raises(KeyboardInterrupt):
        build_accelerator(Config())
    assert made.call_args.kwargs["cpu"] is True


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """Two of them would share a GPU, which NCCL refuses much later, with a traceback."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr("accelerate.Accelerator", Mock(side_effect=KeyboardInterrupt))
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match=r"asked for 2 processes on this host, which has 1 GPU"):
        build_accelerator(Config())
    launcher = Mock(return_value={"CUDA_VISIBLE_DEVICES": "3"})
    monkeypatch.setattr("psutil.Process.environ", launcher)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # of the whole launch
    with pytest.raises(UserError, match="which has 1 GPU"):
        build_accelerator(Config())
    launcher.return_value = {"CUDA_VISIBLE_DEVICES": "2,3"}  # a script in between shows each process its own
    with monkeypatch.context() as own, pytest.raises(KeyboardInterrupt):
        own.setenv("LOCAL_RANK", "1")
        own.setenv("ACCELERATE_BYPASS_DEVICE_MAP", "")
        try:
            build_accelerator(Config())
        finally:  # or DDP would be told of cuda:1
            assert os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] == "true"
    monkeypatch.setattr(
        "ft.runtime.launch_command", lambda _: ["--gpu_ids", "0"]
    )  # which its own environment lacks
    with pytest.raises(UserError, match="which has 1 GPU"):
        build_accelerator(Config())


def test_memory_that_the_device_lacks_before_the_first_update_is_one_message(capsys):
    def main(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with pytest.raises(SystemExit) as stop:
        run_script(main, Config())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: out of memory on the device: CUDA out of memory.") and "Traceback" not in said
    )


def test_what_a_terminal_of_another_encoding_lacks_is_escaped(monkeypatch):
    """A class of another alphabet ends no run."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))
    with pytest.raises(SystemExit) as stop:
        run_script(lambda config: print("\u03b1 \xfc") or 0, Config())
    assert stop.value.code == 0 and written.getvalue().split() == [b"\\u03b1", b"\xfc"]


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(errno.EACCES, "Permission denied", "models/other"), "Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "models/other"), "File name too long"),
    ],
)
def test_a_path_that_cannot_be_reached_is_one_message(error, said, capsys):
    """Simulated: tests may run as root, who can access everything."""

    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main, Config())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: 'models/other' cannot be reached: {said}.\n"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_batches_go_to_a_gpu_from_page_locked_memory_and_the_host_does_not_wait(
    tokenizer, reviews, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = Prepared(tokenizer, dataset_name=reviews).splits["train"]
    moved, pinned = [], []

    def to(batch, *_, non_blocking=False):
        moved.append(non_blocking)
        return batch

    monkeypatch.setattr(MicroBatch, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    for device in ("cpu", "cuda"):
        dataset = RowDataset(rows, tokenizer)
        loader = build_loader(dataset, EvaluationSampler(dataset, 16, 1), 0, torch.device(device))
        assert loader.pin_memory is (device == "cuda")
    batches = list(build_accelerator(Config()).prepare(loader))
    assert len(moved) == len(batches) == 13 and all(moved)
    batch = batches[0].pin_memory()
    of_batch = [*batch.inputs.values(), batch.labels, batch.row_ids, batch.weights]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in of_batch}


def test_more_updates_than_a_schedule_can_hold_are_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UserError, match=r"max_train_steps: 2,000,000,000 updates are more than"):
        build_scheduler(optimizer, Config(), 2_000_000_000)


def test_total_updates_may_be_a_part_of_an_epoch():
    assert total_updates(Config(num_train_epochs=2.5), 7) == 18
    assert total_updates(Config(num_train_epochs=3, max_train_steps=5), 7) == 5


def test_the_same_update_draws_the_same_numbers_and_another_process_or_update_others():
    draws = {}
    for update, rank in ((3, 0), (3, 1), (4, 0), (3, 0)):
        reseed(42, update, rank)
        numbers = [*torch.rand(4).tolist(), *np.random.rand(4).tolist(), *(random.random() for _ in range(4))]
        draws.setdefault((update, rank), []).append(numbers)
    assert draws[3, 0][0] == draws[3, 0][1]
    for begin in (0, 4, 8):  # of torch, numpy and Python: a model's own code may use any
        assert len({tuple(values[0][begin : begin + 4]) for values in draws.values()}) == 3


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_zero():
    model = torch.nn.Linear(2, 2)
    config = Config(learning_rate=1.0, warmup_ratio=0.2, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    schedule = build_scheduler(optimizer, config, 10)
    rates = []
    for _ in range(10):
        rates.append(float(schedule.get_last_lr()[0]))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]  # biases are exempt


def test_the_commit_of_a_repository_that_these_scripts_are_installed_in_is_not_theirs(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "theirs.py").touch()
    (tmp_path / "installed.py").touch()
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "theirs.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "theirs"], check=True)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "theirs.py"))
    assert re.fullmatch("[0-9a-f]{40}", report._git_commit())
    monkeypatch.setattr(report, "__file__", str(tmp_path / "installed.py"))
    assert report._git_commit() is None


def test_a_warmup_longer_than_the_training_is_refused():
    model = torch.nn.Linear(2, 2)
    config = Config(warmup_steps=11)
    with pytest.raises(UserError, match=r"warmup_steps: found 11.*10 updates"):
        build_scheduler(build_optimizer(model, config), config, 10)


@pytest.mark.parametrize(
    ("said", "words", "warns"),
    [
        ("false", [], True),
        ("true", None, False),
        (None, None, False),  # torchrun, or none
        (None, ["--config_file", str(ROOT / "accelerate_configs/multi_gpu.yaml")], True),
        (None, ["--config_file", str(ROOT / "accelerate_configs/multi_cpu.yaml")], False),
        (None, ["--cpu", "--num_processes", "2"], False),
    ],
)
def test_a_launch_for_gpus_that_found_none_is_warned_of(said, words, warns, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if said is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    monkeypatch.setattr(
        "ft.launch.launch_command", lambda _: words if words is None else [*words, "train.py"]
    )
    notes = evaluation_notes({}, torch.device("cpu"))
    assert [note.startswith("WARNING device: no GPU was found") for note in notes] == [True] * warns
    assert all("with 1 thread a process" in note for note in notes)
