"""The watchdog of the tests' launches ends everything that hangs, below a launcher, too."""

import os
import shutil
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
    "words", ["--resume_from_checkpoint run/checkpoints/step-1", "--resume-from-checkpoint=x"]
)
def test_the_batch_script_of_slurm_refuses_another_checkpoint_than_the_latest(tmp_path, words):
    """It would be ignored: the script appends its own request for the latest, which a requeue needs."""
    bash, script = shutil.which("bash"), str(ROOT / "slurm/train.sbatch")
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/nowhere"}  # no Slurm here

    def said(*words):
        return subprocess.run(
            [bash, script, "my.yaml", *words], env=environment, capture_output=True, text=True, timeout=30
        )

    done = said(*words.split())
    assert done.returncode == 2 and "resume_from_checkpoint: leave it out" in done.stderr
    assert "leave it out" not in said("--resume_from_checkpoint", "latest", "--seed", "3").stderr
