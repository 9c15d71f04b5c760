"""A job is preempted and requeued, and ends as if it had not been, on a real Slurm if one is installed."""

import os
from unittest.mock import patch

import pytest
from try_slurm import missing, try_it


@pytest.mark.case(
    "a Slurm job is told to stop before its limit (SIGUSR1), later preempted with a grace time; requeued",
    "saved, queued again, resumed; the end is bit-identical",
)
@pytest.mark.timeout(2000)
@pytest.mark.skipif(bool(missing()), reason=f"Slurm cannot be tried here: {missing()}")
def test_a_preempted_job_is_requeued_and_ends_bit_identical(tmp_path):
    with patch.dict(os.environ):
        try_it(tmp_path)
