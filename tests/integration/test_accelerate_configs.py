"""Every launch config starts what it says: on a CPU for real, the others as Accelerate itself reads them."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ACCELERATE, ROOT, TORCHRUN, flags, launch, series

FOLDER = ROOT / "accelerate_configs"
LAUNCHED = {"cpu": 1, "multi_cpu": 2}
PARSED = {  # distributed type, machines, processes, mixed precision
    "single_gpu": ("NO", 1, 1, "no"),
    "single_gpu_bf16": ("NO", 1, 1, "bf16"),
    "multi_gpu": ("MULTI_GPU", 1, 2, "no"),
    "multi_gpu_bf16": ("MULTI_GPU", 1, 2, "bf16"),
    "multi_node": ("MULTI_GPU", 2, 16, "bf16"),
}
CONSOLE_SCRIPT = [str(Path(sys.executable).parent / "accelerate"), "launch"]


@pytest.fixture
def short(base_flags):
    return flags(**{**base_flags, "max_train_steps": 2, "save_strategy": "no", "eval_strategy": "no"})


def test_each_config_is_tested_here_and_opens_with_its_command():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == LAUNCHED.keys() | PARSED.keys() and not LAUNCHED.keys() & PARSED.keys()
    for name in names:
        comment = [
            line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
        ]
        assert (FOLDER / f"{name}.yaml").read_text().startswith("#") and len(comment) >= 2
        assert any(
            f"accelerate launch --config_file accelerate_configs/{name}.yaml" in line for line in comment
        )


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_cpu_config_starts_its_processes(short, tmp_path, name):
    command = [*CONSOLE_SCRIPT, "--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0"]
    done = launch(command, short)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == LAUNCHED[name]


@pytest.mark.parametrize("name", PARSED)
def test_a_gpu_config_is_what_accelerate_reads(name, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = FOLDER / f"{name}.yaml"
    words = ["--config_file", str(config), "--num_processes", str(PARSED[name][2]), "train.py"]
    args, default, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    kind, machines, processes, wanted = PARSED[name]
    assert (default.distributed_type.value, default.num_machines, default.num_processes) == (
        kind,
        machines,
        processes,
    )
    assert bool(args.multi_gpu) == (kind == "MULTI_GPU")
    assert args.mixed_precision == wanted


@pytest.mark.parametrize("command", [CONSOLE_SCRIPT, ACCELERATE], ids=["accelerate", "python -m"])
def test_fewer_processes_than_asked_for_is_an_error(short, tmp_path, command):
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing; this project does."""
    done = launch([*command, "--cpu", "--num_processes", "2"], short)
    assert done.returncode != 0 and "asked for 2 processes" in done.stderr and "multi_cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_multi_cpu_type_of_accelerate_is_an_error(short, tmp_path):
    config = tmp_path / "trap.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    done = launch([*CONSOLE_SCRIPT, "--config_file", str(config)], short)
    assert done.returncode != 0 and "asked for 2 processes" in done.stderr


def test_world_size_without_the_other_processes_is_an_error(short):
    done = launch([sys.executable], short, WORLD_SIZE="2")
    assert done.returncode == 2 and "asked for 2 processes" in done.stderr and "Traceback" not in done.stderr


def test_torchrun_starts_two(short, tmp_path):
    done = launch([*TORCHRUN, "2"], short)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2


def test_bfloat16_runs_on_a_cpu(base_flags, tmp_path):
    words = flags(**{**base_flags, "learning_rate": 1e-2, "num_train_epochs": 6, "warmup_ratio": 0.1})
    done = launch([*CONSOLE_SCRIPT, "--cpu", "--mixed_precision", "bf16"], words)
    assert done.returncode == 0, done.stderr
    losses = list(series(tmp_path / "run", "train/loss").values())
    assert losses[-1] < 0.95 * losses[0]
    done = launch([sys.executable], [*words, *flags(output_dir=tmp_path / "fp32")])
    assert done.returncode == 0, done.stderr
    assert losses[0] != series(tmp_path / "fp32", "train/loss")[1]  # autocast was really on
