"""The watchdog of the tests' launches ends all that hangs, below a launcher, too."""

import psutil
import pytest
from conftest import ONE, launch

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
    assert not psutil.pid_exists(started)
