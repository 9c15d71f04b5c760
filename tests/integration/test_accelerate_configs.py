"""Every launch config starts what it says: CPU ones really, the others as Accelerate itself parses them."""

import json
import math
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ACCELERATE, FORK, ONE, ROOT, TORCHRUN, flags, launch, series, train_here
from forks import hold_port

from ft.errors import UserError

FOLDER = ROOT / "accelerate_configs"
LAUNCHED = ("cpu", "multi_cpu")
PARSED = {  # distributed type, machines, processes, mixed precision
    "single_gpu": ("NO", 1, 1, "no"),
    "single_gpu_bf16": ("NO", 1, 1, "bf16"),
    "multi_gpu": ("MULTI_GPU", 1, 2, "no"),
    "multi_gpu_bf16": ("MULTI_GPU", 1, 2, "bf16"),
    "multi_gpu_fsdp2": ("FSDP", 1, 2, "bf16"),
    "multi_node": ("MULTI_GPU", 2, 16, "bf16"),
}
CONSOLE_SCRIPT = [str(Path(sys.executable).parent / "accelerate"), "launch"]
SPELLINGS = {
    "accelerate launch": CONSOLE_SCRIPT,
    "python -m accelerate.commands.launch": ACCELERATE,
    "accelerate-launch": [str(Path(sys.executable).parent / "accelerate-launch")],
    "python -m accelerate.commands.accelerate_cli": [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"
    ],
}  # fmt: skip


def config_file(name):
    return ["--config_file", str(FOLDER / f"{name}.yaml")]


def world_size(output_dir):
    return environment_of(output_dir)["world_size"]


def environment_of(output_dir):
    return json.loads((Path(output_dir) / "environment.json").read_text())


def says_that_it_is_launched_by(output_dir, launcher):
    """Whether a run records the command that launches it again: these words, then the script."""
    begin = shlex.join([*launcher, str(ROOT / "train.py"), "--model_name_or_path"])
    return environment_of(output_dir)["command"].startswith(begin)


@pytest.fixture
def short(base_flags):
    """Two updates, nothing else."""
    return {**base_flags, "max_train_steps": 2, "save_strategy": "no", "eval_strategy": "no"}


# --- the files


def test_each_config_is_tested_here():
    names = {path.stem for path in FOLDER.iterdir()}
    assert names == set(LAUNCHED) | PARSED.keys() and not set(LAUNCHED) & PARSED.keys()


@pytest.mark.parametrize("name", [*LAUNCHED, *PARSED])
def test_each_config_opens_with_when_to_use_it_and_a_command_that_accelerate_understands(name):
    from accelerate.commands.launch import launch_command_parser

    text = (FOLDER / f"{name}.yaml").read_text()
    comment = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and len(comment) >= 2 and not comment[0].startswith("accelerate")
    (command,) = [line for line in comment if line.startswith("accelerate launch")]
    given = launch_command_parser().parse_args(command.split()[2:])
    assert given.config_file == f"accelerate_configs/{name}.yaml" and given.training_script == "train.py"


@pytest.mark.parametrize("name", PARSED)
def test_a_gpu_config_is_what_accelerate_reads(name):
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    kind, machines, processes, precision = PARSED[name]
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == (
        kind, machines, processes,
    )  # fmt: skip
    assert config.mixed_precision == precision and config.use_cpu is False

    words = [*config_file(name), *(["--main_process_port", "0"] if machines > 1 else []), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert bool(args.multi_gpu) == (kind == "MULTI_GPU") and bool(args.use_fsdp) == (kind == "FSDP")
    if kind != "NO":
        environment = prepare_multi_gpu_env(args)
        assert int(args.nproc_per_node) * machines == processes
        assert machines > 1 or int(args.master_port) not in (0, 29500)  # any free port
        assert (environment.get("ACCELERATE_USE_FSDP"), environment.get("FSDP_VERSION")) == (
            ("true", "2") if kind == "FSDP" else (None, None)
        )
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
        assert environment["ACCELERATE_USE_CPU"] == "False"
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision


@pytest.mark.parametrize("name", [*LAUNCHED, *PARSED])
def test_a_config_says_nothing_that_belongs_to_the_run(name):
    """Precision and processes belong to the launch; the rest, accumulation above all, to the run."""
    known = (
        "compute_environment distributed_type use_cpu num_machines num_processes machine_rank gpu_ids "
        "main_process_ip main_process_port main_training_function mixed_precision rdzv_backend same_network "
        "fsdp_config"
    )
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= set(known.split())


# --- launches


def test_the_config_of_one_cpu_process_starts_it(short):
    done = launch([*CONSOLE_SCRIPT, *config_file("cpu")], flags(**short))
    assert done.returncode == 0, done.stderr
    assert world_size(short["output_dir"]) == 1
    assert len(series(short["output_dir"], "train/loss")) == 2


def launch_all(commands):
    """Run several launches at the same time."""
    done = [None] * len(commands)

    def one(place):
        done[place] = launch(*commands[place])

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(commands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def test_two_jobs_on_one_machine_do_not_get_into_each_others_way(short, tmp_path):
    """Both with the config of two processes; each records the command that launches it again."""
    folders = {tmp_path / "one": CONSOLE_SCRIPT, tmp_path / "other": ACCELERATE}
    jobs = [
        ([*launcher, *config_file("multi_cpu")], flags(**{**short, "output_dir": folder}))
        for folder, launcher in folders.items()
    ]
    for done in launch_all(jobs):
        assert done.returncode == 0, done.stderr
    assert [world_size(folder) for folder in folders] == [2, 2]
    losses = [series(folder, "train/loss") for folder in folders]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    launcher = ["accelerate", "launch", *config_file("multi_cpu")]
    assert all(says_that_it_is_launched_by(folder, launcher) for folder in folders)


def test_two_machines_work_on_one_run(short):
    """Two launchers with multi_node.yaml, one process each; both machines are this one, without its GPUs."""
    held, port = hold_port()
    more = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    more += ["--mixed_precision", "no"]
    both = [[*CONSOLE_SCRIPT, *config_file("multi_node"), *more, "--machine_rank", rank] for rank in "01"]
    with held:
        for done in launch_all([(command, flags(**short)) for command in both]):
            assert done.returncode == 0, done.stderr
    assert world_size(short["output_dir"]) == 2
    assert len(series(short["output_dir"], "train/loss")) == 2


def test_torchrun_starts_two_which_say_so(short):
    done = launch([*TORCHRUN, "2"], flags(**short))
    assert done.returncode == 0, done.stderr
    assert world_size(short["output_dir"]) == 2
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    assert says_that_it_is_launched_by(short["output_dir"], launcher)


def test_bfloat16_runs_on_a_cpu_and_learns(base_flags, tmp_path):
    words = {**base_flags, "learning_rate": 1e-2, "num_train_epochs": 6, "warmup_ratio": 0.1}
    done = launch([*CONSOLE_SCRIPT, "--cpu", "--mixed_precision", "bf16"], flags(**words))
    assert done.returncode == 0, done.stderr
    losses = list(series(tmp_path / "run", "train/loss").values())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.95 * losses[0]
    full = {**words, "output_dir": tmp_path / "fp32", "max_train_steps": 1}
    assert launch(FORK, flags(**full)).returncode == 0
    reference = series(tmp_path / "fp32", "train/loss")[1]
    assert losses[0] != reference and losses[0] == pytest.approx(reference, rel=1e-2)  # autocast was on


# --- launches that started fewer processes than requested


def assert_refused(done, output_dir):
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("error: ")[0]
    assert re.search(r"error: the launch asked for 2 processes", done.stderr), done.stderr
    assert "multi_cpu.yaml" in done.stderr  # the remedy
    assert not Path(output_dir).exists()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_cpu_and_num_processes_start_one_process_which_refuses(short, spelling):
    """`accelerate launch --cpu --num_processes 2` silently starts one process; this project reports it."""
    done = launch([*SPELLINGS[spelling], "--cpu", "--num_processes", "2"], flags(**short))
    assert_refused(done, short["output_dir"])


@pytest.mark.parametrize("where", ["--config_file", "default config"])
def test_the_multi_cpu_type_of_accelerate_starts_one_process_which_refuses(short, tmp_path, where):
    trap = (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    folder = tmp_path / "hf" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text(trap)
    if where == "--config_file":
        command = [*CONSOLE_SCRIPT, "--config_file", str(folder / "default_config.yaml")]
        done = launch(command, flags(**short))
    else:  # what `accelerate config` has written
        done = launch(CONSOLE_SCRIPT, flags(**short), HF_HOME=str(tmp_path / "hf"))
    assert_refused(done, short["output_dir"])


def test_world_size_without_the_other_processes_is_an_error_with_exit_code_2(short):
    done = launch(ONE, flags(**short), WORLD_SIZE="2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "asked for 2 processes" in done.stderr and "WORLD_SIZE" in done.stderr
    assert not Path(short["output_dir"]).exists()


@pytest.mark.parametrize("plugin", ["MEGATRON_LM", "DEEPSPEED"])
def test_a_launch_that_splits_the_model_in_an_unknown_way_is_refused(short, monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(UserError, match=f"the launch asks for {plugin} .*use .*multi_gpu_fsdp2.yaml"):
        train_here(**short)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "asks for torch dynamo .*--torch_compile"),
        (
            "ACCELERATE_MIXED_PRECISION",
            "bfloat16",
            "found 'bfloat16' in the environment, expected no, bf16, fp16",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16 on a CPU.*--mixed_precision bf16 or no"),
    ],
)
def test_what_a_launch_would_change_or_leave_out_without_a_word_is_refused(
    short, monkeypatch, variable, value, message
):
    """Accelerate's dynamo exports weights under other names; its fp16 on a CPU is fp32."""
    if value == "fp16" and torch.accelerator.is_available():
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        train_here(**short)
    assert not Path(short["output_dir"]).exists()


def test_a_script_that_starts_a_run_is_no_launcher_whatever_its_name(short, tmp_path):
    """A user's launch.py with its own --num_processes is not Accelerate's."""
    script = tmp_path / "launch.py"
    words = [*ONE, str(ROOT / "train.py"), *flags(**short)]
    script.write_text(f"import subprocess, sys\nsys.exit(subprocess.call({words!r}))\n")
    command = [*ONE, str(script), "--num_processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert world_size(short["output_dir"]) == 1
    assert says_that_it_is_launched_by(short["output_dir"], [Path(sys.executable).name])
