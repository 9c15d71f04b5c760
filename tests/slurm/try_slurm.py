"""Jobs on a real one-node Slurm, stopped and requeued: `python tests/slurm/try_slurm.py`.

Needs root and the packages slurm-wlm and munge (Debian). Starts their daemons with a separate configuration,
submits slurm/train.sbatch, sends what Slurm sends before the time limit, has another job preempt it, and
compares the result with a run that was not stopped. A cancelled job stays cancelled."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CONFIG = """ClusterName=try
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={other_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
NodeName={host} CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
SECONDS = 1200  # for all of it, which takes four minutes


def missing():
    """Why it cannot be tried here; empty if it can."""
    if os.geteuid():
        return "needs root"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def free_ports():
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("", 0))
        return one.getsockname()[1], other.getsockname()[1]


@contextlib.contextmanager
def daemons(folder):
    """munged, slurmctld and slurmd, while the block runs."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    port, other_port = free_ports()
    config.write_text(
        CONFIG.format(host=host, folder=folder, port=port, other_port=other_port, cpus=os.cpu_count())
    )
    os.environ["SLURM_CONF"] = str(config)
    key, socket_path = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    started = []
    log = open(folder / "daemons.log", "w")
    try:
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}",
             f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
             f"--seed-file={folder}/munged.seed"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", host],
        ):  # fmt: skip
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(2)
            if started[-1].poll() is not None:
                raise RuntimeError(f"{command[0]} ended: {(folder / 'daemons.log').read_text()}")
        yield
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()


def said(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def wait_for(what, condition, end):
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}: {said('squeue', '--long')}")
        time.sleep(0.2)


def state_of(job):
    """The state of the job, and how often it was restarted."""
    fields = dict(word.split("=", 1) for word in said("scontrol", "show", "job", job).split() if "=" in word)
    return fields["JobState"], int(fields["Restarts"])


def rows(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def try_it(folder):
    """Raises if something is not as it should be."""
    import conftest
    from compare import same_bits, without_timing

    os.environ |= {"HF_HOME": str(folder / "hf-home"), "PROCESSES_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    model = conftest.make_tiny_model(folder / "model")
    data = conftest.make_reviews(folder / "reviews")
    words = {
        "model_name_or_path": model, "dataset_name": data, "max_train_steps": 1500, "logging_steps": 10,
        "eval_strategy": "steps", "eval_steps": 100, "save_strategy": "steps", "save_steps": 400,
    }  # fmt: skip
    whole = folder / "whole"
    done = conftest.launch([*conftest.TORCHRUN, "2"], conftest.flags(**words, output_dir=whole))
    assert done.returncode == 0, done.stderr
    place, end = folder / "run", time.monotonic() + SECONDS
    with daemons(folder):
        job = submitted(folder / "job.log", **words, output_dir=place)
        wait_for("the first updates", lambda: rows(place) >= 20, end)
        said("scancel", "--signal=USR1", "--batch", job)
        goes_on(job, 1, place, end)
        wait_for("more updates", lambda: rows(place) >= 40, end)
        urgent = said("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null",
                      "--wrap=sleep 5")  # fmt: skip
        wait_for("the other job", lambda: state_of(urgent)[0] == "COMPLETED", end)
        goes_on(job, 2, place, end)
        wait_for("the end", lambda: state_of(job)[0] in ("COMPLETED", "FAILED", "CANCELLED"), end)
        state, restarts = state_of(job)
        log = (folder / "job.log").read_text()
        assert (state, restarts) == ("COMPLETED", 2), log
        assert log.count("stopped after update") == 2 and log.count("resumed from") == 2, log

        other = submitted(folder / "other.log", **words, output_dir=folder / "cancelled")
        wait_for("the first updates", lambda: rows(folder / "cancelled") >= 20, end)
        said("scancel", other)
        wait_for("the end", lambda: state_of(other)[0] == "CANCELLED", end)
        time.sleep(5)
        assert state_of(other) == ("CANCELLED", 0), (folder / "other.log").read_text()
        print("a job that was cancelled stayed so")
    assert same_bits(whole / "final", place / "final")
    assert without_timing(whole) == without_timing(place)
    print("twice resumed, completed: bit-identical to a run that was not stopped")


def submitted(log, **words):
    """The number of a job that runs slurm/train.sbatch."""
    import conftest

    job = said(
        "sbatch", "--parsable", f"--output={log}", "--ntasks-per-node=1", "--cpus-per-task=2",
        str(ROOT / "slurm" / "train.sbatch"), *conftest.flags(**words),
    )  # fmt: skip
    print(f"submitted job {job}", flush=True)
    return job


def goes_on(job, restarts, place, end):
    """Wait until a job has saved and is requeued, and start it."""
    wait_for("the requeue", lambda: state_of(job)[1] == restarts, end)
    stopped = sorted(path.name for path in (place / "checkpoints").glob("step-*"))
    print(f"saved {stopped[-1]}, queued again", flush=True)
    assert not (place / "results.json").exists()
    time.sleep(15)  # slurmd refuses a job that it is still cleaning up
    said("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait two minutes


if __name__ == "__main__":
    if missing():
        sys.exit(f"cannot be tried here: {missing()}")
    with tempfile.TemporaryDirectory(prefix="try-slurm-") as temporary:
        try:
            try_it(Path(temporary))
        except BaseException:
            for name in ("job.log", "slurmctld.log", "slurmd.log"):
                path = Path(temporary) / name
                if path.exists():
                    print(f"--- {name}\n{path.read_text()[-3000:]}", file=sys.stderr)
            raise
