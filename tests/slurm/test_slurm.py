"""A job is preempted, requeued and ends as if it had not been, on a real Slurm where one is installed."""

import os

import pytest
from try_slurm import missing, try_it


@pytest.mark.case(
    "a Slurm job is told to stop before its limit (SIGUSR1), later preempted with a grace time; requeued",
    "saved, queued again, resumed; the end is bit-identical",
)
@pytest.mark.timeout(2000)
@pytest.mark.skipif(bool(missing()), reason=f"Slurm cannot be tried here: {missing()}")
def test_a_preempted_job_is_requeued_and_ends_bit_identical(tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "HF_HOME", "PROCESSES_PER_NODE", "OMP_NUM_THREADS", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    try_it(tmp_path)
