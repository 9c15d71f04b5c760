"""Lost processes that the launcher restarts (`--max_restarts`): they meet, resume, and lose nothing."""

import psutil
import pytest
from compare import same_bits, without_timing
from conftest import FORKS, flags, launch, two_processes, wait_for


def words(model, data, folder):
    return flags(
        model_name_or_path=model, dataset_name=data, output_dir=folder, learning_rate=1e-3, logging_steps=1,
        max_train_steps=60, num_train_epochs=20, save_strategy="steps", save_steps=7,
        resume_from_checkpoint="latest",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """The run on two processes, without a loss."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = launch(FORKS, words(tiny_model, reviews, folder))
    assert done.returncode == 0, done.stderr
    return folder


# The others then find only what the previous attempt has left of this process in the launcher's store.
LATE = """
import os, time
if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ["RANK"] == os.environ["LATE"]:
    time.sleep(2)
"""


@pytest.fixture(params=[0, 1])
def rank(request):
    return request.param


@pytest.fixture
def restarting(started, tiny_model, reviews, tmp_path, rank):
    """Accelerate's launcher with two processes that may be restarted, one of which is late."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    late = {"LATE": str(rank), "PYTHONPATH": str(tmp_path)}
    command = [*two_processes(), "--max_restarts", "3"]
    return started(command, words(tiny_model, reviews, tmp_path / "run"), **late)


@pytest.mark.case(
    "SIGKILL to either of two processes, under `accelerate launch --max_restarts`",
    "both start again by themselves from the last checkpoint; the end is bit-identical",
)
def test_a_lost_process_comes_back(tmp_path, whole, restarting, rank):
    wait_for(tmp_path / "run/checkpoints/latest", restarting)
    (lost,) = [p for p in psutil.Process(restarting.pid).children() if p.environ()["RANK"] == str(rank)]
    lost.kill()
    out, err = restarting.communicate(timeout=120)
    assert restarting.returncode == 0, err
    assert "resumed from" in out
    assert same_bits(whole / "final", tmp_path / "run/final")
    assert without_timing(whole) == without_timing(tmp_path / "run")
