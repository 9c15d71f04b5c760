"""The watchdog of the tests' launches ends everything that hangs, below a launcher, too."""

import os
import subprocess

import psutil
import pytest
from conftest import ONE, ROOT, launch

LAUNCHER = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print("started", subprocess.Popen(sleep, start_new_session=True).pid, flush=True)  # as torchrun does
time.sleep(600)
"""


def test_a_launch_that_hangs_is_killed_with_all_that_it_started(tmp_path):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    with pytest.raises(pytest.fail.Exception, match="hung for 10 s") as caught:
        launch(ONE, [], script=str(tmp_path / "launcher.py"), timeout=10)
    started = int(str(caught.value).split("started ")[1].split()[0])
    processes = psutil.process_iter(["status"])
    assert started not in {one.pid for one in processes if one.info["status"] != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize(
    "words, lines, refused",
    [
        ("--resume_from_checkpoint run/checkpoints/step-1", "", "resume_from_checkpoint"),
        ("--resume-from-checkpoint=x", "", "resume_from_checkpoint"),
        ("--seed 3", "resume_from_checkpoint: x  # a comment", "resume_from_checkpoint"),
        ("--max_time 4h", "", "max_time"),
        ("", "seed: 3\nmax_time: 4h", "max_time"),
        ("--resume_from_checkpoint latest --seed 3", "max_time: null\nresume_from_checkpoint: latest", None),
    ],
)
def test_the_batch_script_of_slurm_refuses_what_would_not_count_there(tmp_path, words, lines, refused):
    """It appends its own request for the latest checkpoint, which a requeue needs; and a run that max_time
    ends would be restarted by its launcher."""
    (tmp_path / "my.yaml").write_text(lines + "\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm/train.sbatch"), "my.yaml", *words.split()],
        env=environment | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if refused:
        assert done.returncode == 2 and done.stderr.startswith(f"{refused}: leave it out")
    else:
        assert done.returncode == 1 and "SLURM_JOB_ID" in done.stderr  # as there is no job here
