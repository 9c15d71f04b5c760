"""How this process was launched: what the launcher asked for, and with how many processes. Also ends launches
started from here."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from typing import Any


def asks_for(name: str) -> bool:
    """Whether the launch has set ACCELERATE_USE_`name`."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true")


def asked_precision() -> str:
    """The mixed precision that the launch asks for, in Accelerate's words."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def asked_processes() -> int:
    """How many processes the launch asked for, as far as can be known from here.

    `accelerate launch` with MULTI_CPU, or with --cpu and --num_processes 2, silently starts one process (seen
    with 1.15). Its own parser tells what was requested, from the parent's command line.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked > 1:
        return asked
    found = _launch_options()
    if found is None:
        return asked
    options, file = found
    given = options.num_processes
    if given is None and file is not None:
        given = file.num_processes
    return max(asked, given or 1)


def asks_for_gpus() -> bool:
    """Whether `accelerate launch` started this process for GPUs: it tells a single process so; for several,
    its arguments say so."""
    if "ACCELERATE_USE_CPU" in os.environ:
        return not asks_for("CPU")
    found = _launch_options()
    return found is not None and not (found[0].cpu or getattr(found[1], "use_cpu", False))


def _launch_options() -> tuple[Any, Any] | None:
    """The options of `accelerate launch`, and its config file if it reads one; None if something else started
    this process."""
    words = launch_command(os.getppid())
    if words is None:
        return None
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options, _ = launch_command_parser().parse_known_args(words)
    # With --cpu, the default file is not read.
    is_asked = options.config_file or (os.path.isfile(default_config_file) and not options.cpu)
    return options, load_config_from_file(options.config_file) if is_asked else None


def relaunch_command() -> str:
    """The command that started this process: that of its launcher, if there is one."""
    parent = _command_of(os.getppid())
    if (start := _launch_words(parent)) is not None:
        return shlex.join(["accelerate", "launch", *parent[start:]])
    for place, word in enumerate(parent[:4]):
        if os.path.basename(word) == "torchrun" or word == "torch.distributed.run":
            return shlex.join(["torchrun", *parent[place + 1 :]])
    return shlex.join([os.path.basename(sys.executable), *sys.argv])


def launch_command(process_id: int) -> list[str] | None:
    """The arguments after `accelerate launch` in a process's command line; None if it is another program."""
    command = _command_of(process_id)
    start = _launch_words(command)
    return None if start is None else command[start:]


def _command_of(process_id: int) -> list[str]:
    """A process's command line; empty if it cannot be read."""
    import psutil

    try:
        return psutil.Process(process_id).cmdline()
    except psutil.Error:
        return []


def kill_launch(process: subprocess.Popen[Any]) -> None:
    """Send SIGKILL to a launcher that is still running and to all that it has started; returns when they have
    ended.

    A signal to its process group would reach only the launcher: torchrun gives each process a session of its
    own."""
    import psutil

    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    for one in started:  # before the launcher, whose end they would notice
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait()
    psutil.wait_procs(started, timeout=10)


def _launch_words(command: list[str]) -> int | None:
    """Where the arguments of Accelerate's launcher begin in a command line; None if it is another
    program's."""
    for place, word in enumerate(command[:4]):
        name = os.path.basename(word)
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return place + 1
        is_program = name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        if is_program and command[place + 1 : place + 2] == ["launch"]:
            return place + 2
    return None
