"""The run's interface to the machine: environment, the one Accelerator, seeds, exit codes."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ft import rendezvous
from ft.config import DEFAULT_GLOBAL_BATCH_SIZE, Config, EvalConfig
from ft.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    Stopped,
    UserError,
    first_line,
    print_error,
)
from ft.heap import settle_heap
from ft.launch import asked_precision, asked_processes, asks_for, launch_command
from ft.signals import follow_launcher
from ft.writer import finish_writing

if TYPE_CHECKING:
    from accelerate import Accelerator


ConfigT = TypeVar("ConfigT", bound=Config)
STARTED = time.monotonic()
_first_start = [STARTED]
OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # of a path that the user named


# Plugins of Accelerate that split a model over processes in ways that checkpoints and sums do not support.
UNKNOWN_PLUGINS = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
PRECISIONS = ("no", "bf16", "fp16")
NO_FP16 = (
    "the launch asks for mixed precision fp16 on a CPU, where Accelerate would compute in fp32 and say fp16; "
    "launch with --mixed_precision bf16 or no."
)


def run_script(main: Callable[[ConfigT], int], config: ConfigT) -> NoReturn:
    """Run a script's main function and exit with its code; a `UserError` is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # any class name can then be written to a Latin-1 terminal
            stream.reconfigure(errors="backslashreplace")
    settle_heap()
    set_environment(config)
    launcher = os.getppid()
    if "LOCAL_RANK" in os.environ or launch_command(launcher) is not None:
        follow_launcher(launcher)
    try:
        code = main(config)
    except Stopped:
        code = EXIT_STOPPED
    except UserError as error:
        print_error(str(error))
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as stop:  # from a signal handler
        code = stop.code if isinstance(stop.code, int) else EXIT_CRASH
    except Exception as error:
        code = EXIT_CRASH
        if type(error).__name__ == "OutOfMemoryError":  # torch's; an update has a message of its own
            code = EXIT_USER_ERROR
            print_error(
                f"out of memory on the device: {first_line(error)} Another process may hold it; a model too "
                "large for it may fit with lora_rank, freeze or accelerate_configs/multi_gpu_fsdp2.yaml."
            )
        elif isinstance(error, OSError) and error.errno in OUT_OF_REACH and error.filename:
            code = EXIT_USER_ERROR
            print_error(f"{str(error.filename)!r} cannot be reached: {error.strerror}.")
        else:
            with contextlib.suppress(OSError):
                traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more; Python would change the exit code for that
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        sys.exit(code)
    if code in (EXIT_DONE, EXIT_STOPPED):
        torch.distributed.barrier()
    from ft.wandb_run import close_trackers

    close_trackers(code)
    # Not sys.exit: gloo's threads sometimes abort a process that leaves its group in the ordinary way
    # ("terminate called without an active exception", one in ten with torch 2.13).
    finish_writing()
    os._exit(code)


def set_environment(config: Config) -> None:
    """Choices that must be made before torch and the Hugging Face libraries are imported."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "false")  # of `datasets` and `evaluate`: names of data
    if _says_yes("HF_HUB_OFFLINE") or _says_yes("TRANSFORMERS_OFFLINE"):  # which `evaluate` does not read
        os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _shown_its_own_gpu() -> bool:
    """Whether this process sees another GPU than the process that launched it, as when a script between the
    two shows each process its own."""
    import psutil

    name = "CUDA_VISIBLE_DEVICES"
    words = launch_command(os.getppid())
    if words is not None and "--no_python" not in words:
        return False  # Accelerate shows all of its processes the same, also with --gpu_ids
    try:
        of_launcher = psutil.Process(os.getppid()).environ().get(name)
    except psutil.Error:
        return name in os.environ
    return os.environ.get(name, of_launcher) != of_launcher


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _check_launch() -> None:
    """Raise `UserError` for a launch that lacks processes, or asks for something these scripts do not do."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and missing:
        raise UserError(
            f"the launch asked for {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), but nothing launched "
            f"them ({', '.join(missing)} not set). Use accelerate launch or torchrun, or unset WORLD_SIZE."
        )
    for name in UNKNOWN_PLUGINS:
        if asks_for(name):
            raise UserError(
                f"the launch asks for {name} (distributed_type, or ACCELERATE_USE_{name}), which these "
                "scripts do not know. For a model too large for one device, use "
                "accelerate_configs/multi_gpu_fsdp2.yaml; --gradient_checkpointing and a smaller "
                "--per_device_train_batch_size save memory, too."
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "the launch asks for torch dynamo (dynamo_backend), which would compile the model as a whole and "
            "rename its weights; leave it out of the launch: --torch_compile compiles the model's layers."
        )


def build_accelerator(config: Config) -> Accelerator:
    """The Accelerator of the run; nothing else configures Accelerate.

    Raises `UserError` if fewer processes run than were requested.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    from ft.hosts import PATIENCE
    from ft.tracking import choose_trackers

    _check_launch()
    # Apple's GPUs (mps) lack the float64 in which losses are summed.
    kind = torch.accelerator.current_accelerator(check_available=True)
    use_cpu = asks_for("CPU") or kind is None or kind.type == "mps"
    if not use_cpu and "TORCHELASTIC_RUN_ID" in os.environ:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
        if here > gpus and not (gpus == 1 and _shown_its_own_gpu()):
            raise UserError(
                f"the launch asked for {here} processes on this host, which has {gpus} GPU(s); lower "
                "--num_processes, the result stays the same."
            )
    if not use_cpu and torch.accelerator.device_count() == 1 and os.environ.get("LOCAL_RANK", "0") != "0":
        # It sees only its own GPU, as the first; Accelerate would have DDP use the one of its local rank.
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    precision = asked_precision()
    if precision not in PRECISIONS:  # which Accelerate would silently ignore
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION: found {precision!r} in the environment, expected "
            f"{', '.join(PRECISIONS)}."
        )
    sharding = None
    if asks_for("FSDP"):
        from ft.fsdp import Sharding, shard_over_processes

        if isinstance(config, EvalConfig):
            raise UserError(
                "the launch asks for FSDP, but eval.py has the whole model in each process: use "
                "accelerate_configs/multi_gpu.yaml."
            )
        sharding = Sharding()
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time; nothing here reads it
        torch.backends.cudnn.benchmark = False
    # Whatever the default of the version of torch is (that of convolutions is TF32).
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    method = rendezvous.init_method() if rendezvous.store_is_reused() else None
    accelerator = Accelerator(
        cpu=use_cpu,  # without it, each of several CPU processes would think it is alone
        # An evaluation uses no tracker; those in the config of its run need not be installed.
        log_with=None if isinstance(config, EvalConfig) else choose_trackers(config.tracker_names) or None,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,  # one scheduler step per call, not one per process
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop scales its losses
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(init_method=method, timeout=PATIENCE),
        ],
        fsdp_plugin=sharding,
    )
    if sharding is not None and accelerator.num_processes > 1:
        shard_over_processes(accelerator, sharding)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise UserError(NO_FP16)
    # torch 2.13 renames broadcast_buffers, which Accelerate passes on; buffers here never change, so none is
    # sent.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    asked = asked_processes()
    if accelerator.num_processes < asked:
        raise UserError(
            f"the launch asked for {asked} processes, but this one stands alone. On CPUs, use "
            "accelerate_configs/multi_cpu.yaml (MULTI_GPU with use_cpu, which starts gloo processes); on "
            "GPUs, distributed_type: MULTI_GPU."
        )
    return accelerator


def resolve_batch_size(config: Config, num_processes: int) -> list[str]:
    """Settle global_batch_size and the micro-batch limit in `config`; returns notes for the user.

    Afterwards, the config means the same on any launch: global_batch_size is set, gradient_accumulation_steps
    is not. Raises `UserError` if the sizes contradict one another on this launch."""
    bound, steps, note = config.per_device_train_batch_size, config.gradient_accumulation_steps, ""
    if config.global_batch_size is None and bound and steps:
        config.global_batch_size = bound * steps * num_processes
        note = (
            f"global batch {config.global_batch_size} = {bound} rows x {steps} accumulation steps x "
            f"{num_processes} processes, as per_device_train_batch_size and gradient_accumulation_steps ask; "
            f"set global_batch_size: {config.global_batch_size} to keep it on any launch"
        )
    elif config.global_batch_size is None:
        config.global_batch_size = DEFAULT_GLOBAL_BATCH_SIZE
        if bound or steps:
            note = f"global batch {DEFAULT_GLOBAL_BATCH_SIZE} (the default), whatever the launch"
    share = -(-config.global_batch_size // num_processes)
    if bound and steps and -(-share // bound) != steps:
        raise UserError(
            f"global_batch_size: {config.global_batch_size} on {num_processes} processes in micro-batches of "
            f"at most {bound} rows takes {-(-share // bound)} accumulation steps, but "
            f"gradient_accumulation_steps is {steps}; leave it out: it is derived."
        )
    if steps and not bound:
        config.per_device_train_batch_size = -(-share // steps)
    config.gradient_accumulation_steps = None
    return [note] if note else []


def reseed(seed: int, update: int, rank: int) -> None:
    """Set all generators from (seed, update, rank), so that a resumed run has no generator state to
    restore."""
    seed_generators(((seed * 1_000_003 + update) * 65_537 + rank) % 2**63)


def seed_generators(number: int) -> None:
    """Seed torch, numpy and Python: nothing here draws from the last two, but the code of a model may
    (`trust_remote_code`; some of Transformers' own do)."""
    import numpy as np
    import torch

    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def total_updates(config: Config, updates_per_epoch: int) -> int:
    """Optimizer updates of the whole run."""
    # Rounded, as 0.55 * 100 is a little more than 55.
    return config.max_train_steps or math.ceil(round(config.num_train_epochs * updates_per_epoch, 6))


def run_began() -> float:
    """When a run that begins now began (in `time.monotonic`): the first run of a process began with the
    process."""
    return _first_start.pop() if _first_start else time.monotonic()
