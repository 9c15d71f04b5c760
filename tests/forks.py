"""Runs scripts in forks of a process that has done all their imports, which are most of a launch's time.

Either the script alone, or several gloo processes under a parent that sets their environment and ends them as
a launcher does."""

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from multiprocessing import forkserver, get_context, set_start_method
from pathlib import Path

import psutil
from spared import spared

ROOT = Path(__file__).parent.parent
_context = get_context("forkserver")
_context.set_forkserver_preload(["warm"])


class Fork:
    """A script in a process group of its own, with the part of Popen's interface that tests use. Its output
    goes to files, so that nobody has to read it meanwhile. `drawn` and `resampled` are for `spared`."""

    def __init__(self, script, words, processes=1, drawn=False, resampled=False):
        self._said = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]
        names = [file.name for file in self._said]
        ensure_server()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run = partial(_run, str(ROOT / script), list(map(str, words)), drawn, resampled)
        self._process = _context.Process(target=_lead, args=(run, processes, names, environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """The exit code; None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        """Wait for the end of the script or, with several processes, only of their parent."""
        self._process.join(timeout)

    def communicate(self, timeout=None):
        """Wait for the end of all its processes; returns their standard output and standard error."""
        end = time.monotonic() + (timeout or 1e9)
        self._process.join(timeout)
        while self.poll() is None or self._others():
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self._said[0].name, timeout)
            time.sleep(0.02)
        return tuple(Path(file.name).read_text() for file in self._said)

    def _others(self):
        """Whether any process of the group is still running: a parent may have been killed."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getpgid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def send_signal(self, number):
        """Send a signal to the script or, with several processes, only to their parent."""
        os.kill(self.pid, number)

    def kill(self):
        """Send SIGKILL to the script or, with several processes, only to their parent."""
        self._process.kill()


def ensure_server():
    """Start the process that the others are forked from, if it is not running. What its libraries read on
    import, they read now; Python 3.11's does not have the import path of those that start it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), before]))
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


def hold_port():
    """A port of this machine, and the socket that reserves it: whoever listens on it binds it by number, with
    address reuse (as torch's store does)."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, str(held.getsockname()[1])


def _lead(run, processes, said, environment):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    set_start_method("fork", force=True)  # multiprocessing's default again, as in a script
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    if processes == 1:
        run()
    held, port = hold_port()
    ranks = set()
    for rank in range(processes):
        if pid := os.fork():
            ranks.add(pid)
            continue
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        run()
    with held:
        os._exit(_wait(ranks))


def _run(script, words, drawn, resampled):
    """The script as `python SCRIPT WORDS` runs it, except for what is spared."""
    sys.argv, sys.path[0:0], code = [script, *words], [str(Path(script).parent)], 0
    try:
        with spared(drawn, resampled):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(ranks, patience=30):
    """Wait for all. If one fails, the others are asked to stop, and killed if they have not after `patience`
    seconds."""
    code, end = 0, None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        ranks.discard(pid)
        if status and end is None:
            code, end = 1, time.monotonic() + patience
            _send(ranks, signal.SIGTERM)
        if end is not None and time.monotonic() > end:
            _send(ranks, signal.SIGKILL)
        if not pid:
            time.sleep(0.02)
    return code


def _send(ranks, number):
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
