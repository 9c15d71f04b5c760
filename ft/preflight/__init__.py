"""`train.py --preflight`: audits the data, tests the machine and forecasts the run, before you pay for it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.config import Config
from ft.errors import EXIT_DONE, EXIT_USER_ERROR, UserError, printable
from ft.preflight.findings import BLOCKING, Findings

if TYPE_CHECKING:
    from ft.hosts import HostGroup
    from ft.preflight.probe import Probe

PLACE = ".preflight-"  # prefix, in output_dir: on the disk on which the run will write, but no part of it
STOPS_THE_PROBE = {"data", "labels", "not_utf8", "model"}


def preflight(config: Config, train: Callable[..., int]) -> int:
    """Print what was found, on one screen, and write it to output_dir/preflight.json; returns 0 if the run
    can start and end, else 2. `train` is the function of train.py, whose loop makes the probe's updates.

    Called on all processes of the launch; the main one prints."""
    from ft.hosts import HostGroup
    from ft.preflight.forecast import judged, room_on_disk
    from ft.resume import of_launch
    from ft.runtime import build_accelerator, resolve_batch_size

    accelerator = build_accelerator(config)
    hosts = HostGroup(accelerator)
    resolved = replace(config)
    with contextlib.suppress(UserError):  # the probe finds it, too
        resolve_batch_size(resolved, accelerator.num_processes)
    hosts.check_same(of_launch(resolved, accelerator))  # as a run does first: another host may differ
    begun = time.monotonic()
    report, findings = hosts.from_main(lambda: _audit(config))
    waited = time.monotonic() - begun
    failed = False
    if STOPS_THE_PROBE & findings.blocking_topics():
        findings.warn("not_tried", "nothing was tried or forecast: fix the data or the model first")
    else:
        room = room_on_disk(config)
        place = hosts.from_main(lambda: _place(config))
        try:
            probe = _probe(config, train, place, findings, hosts)
            failed = probe is None
            if probe is not None:
                report |= judged(config, probe, waited, room, findings)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(place, ignore_errors=True)
    if not failed or accelerator.num_processes == 1:
        return hosts.from_main(lambda: _conclude(config, report, findings))
    # An error of one process, such as out of memory, may have left the others in a collective: the first one
    # here prints, and its launcher ends the others (which by then note signals and do nothing else).
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(accelerator.process_index)
    return _conclude(config, report, findings)


def _audit(config: Config) -> tuple[dict[str, Any], Findings]:
    from ft.output import check_output_dir, check_seeds_dir
    from ft.preflight.audit import audit_apart
    from ft.push import check_hub

    report, findings = audit_apart(config)
    try:
        if config.num_seeds > 1:
            check_seeds_dir(config)
            if config.resume_from_checkpoint is not None:
                findings.warn("checkpoint", "work done on the seeds is forecast, too, as if still to come")
        else:
            for warning in check_output_dir(config)[1]:
                findings.warn("checkpoint", warning)
    except UserError as error:
        findings.block("output_dir", str(error))
    try:
        check_hub(config, create=False)
    except UserError as error:
        findings.block("push_to_hub", str(error))
    return report, findings


def _place(config: Config) -> Path:
    """The folder that the probe writes to."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=PLACE, dir=folder))  # next to that of another preflight
    except OSError:  # which is a finding
        return Path(tempfile.mkdtemp(prefix="preflight-"))


def _probe(
    config: Config, train: Callable[..., int], place: Path, findings: Findings, hosts: HostGroup
) -> Probe | None:
    """The probe after its run, or if there was nothing to run; None if an error, which is a finding, ended
    it."""
    from ft.output import check_output_dir
    from ft.preflight.memory import (
        LEAST,
        free_host_bytes,
        is_out_of_memory,
        limited_to,
        processes_here,
        used_host_bytes,
    )
    from ft.preflight.probe import NothingLeft, Probe

    blocking = findings.blocking_topics()
    checkpoint = None
    if config.num_seeds == 1 and "output_dir" not in blocking:
        checkpoint = hosts.from_main(lambda: check_output_dir(config)[0])
    short = config.private(
        preflight=False, output_dir=str(place), overwrite_output_dir=True, max_time=None,
        resume_from_checkpoint=str(checkpoint) if checkpoint else None,
        on_bad_rows="drop" if "bad_rows" in blocking else config.on_bad_rows,
    )  # fmt: skip
    made: list[Probe] = []

    def make(*args: Any) -> Probe:
        made.append(Probe(*args))
        return made[0]

    processes, free = processes_here(), free_host_bytes()
    too_little = (
        f"memory: {free / 1e9:.1f} GB were free for {processes} process{'es' * (processes > 1)}, too little "
    )
    remedy = "lower per_device_train_batch_size (the result stays the same) or max_length."
    share = free // processes
    if share < LEAST:
        findings.block("memory", f"{too_little}to try anything; free some.")
        return None
    most = share + used_host_bytes()
    with limited_to(share):
        try:
            with contextlib.suppress(NothingLeft):
                train(short, make)
            made[0].measured.most_host_bytes = most
            return made[0]
        except UserError as error:
            findings.block("memory" if is_out_of_memory(error) else "run", str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:200]
            if type(error).__name__ == "OutOfMemoryError":  # torch's, for a device
                findings.block("memory", f"too little on the device, which another process may hold ({why})")
                return None
            findings.block(
                "memory", f"{too_little}for the longest update or what follows it ({why}); {remedy}"
            )
    return None


def _conclude(config: Config, report: dict[str, Any], findings: Findings) -> int:
    """Write preflight.json, print the screen, and return the exit code."""
    from ft.output import write_whole
    from ft.preflight.screen import screen
    from ft.tracking import to_json

    blocking = findings.messages(BLOCKING)
    report = {"fit": not blocking, "findings": findings.as_json(), **report}
    path = Path(config.output_dir) / "preflight.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_json(report, indent=1) + "\n")
        report["written"] = str(path)
    except OSError as error:
        report["written"] = f"nothing: {path}: {error.strerror}"
    except UserError as error:
        report["written"] = f"nothing: {error}"
    print(printable("\n".join(screen(report))), flush=True)
    return EXIT_USER_ERROR if blocking else EXIT_DONE
