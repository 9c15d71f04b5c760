"""Asked to stop, a run saves its state and exits with 75, whichever process was asked, at whatever point."""

import contextlib
import fcntl
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from compare import same_bits, without_timing
from conftest import (
    ACCELERATE,
    FORK,
    FORKS,
    ONE,
    ROOT,
    TORCHRUN,
    all_ended,
    changed_train,
    flags,
    kill_launch,
    launch,
    metrics_of,
    train_here,
)

import ft.saver
from ft.tasks.text_classification import TextClassification

SLOW = {"num_train_epochs": 40, "logging_steps": 1, "save_strategy": "no", "per_device_eval_batch_size": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = launch(FORK, words(tiny_model, reviews, folder))
    assert done.returncode == 0, done.stderr
    return folder


pytestmark = pytest.mark.usefixtures("heeds_hangups")


def words(model, data, folder):
    return flags(model_name_or_path=model, dataset_name=data, output_dir=folder, learning_rate=1e-3, **SLOW)


@pytest.fixture
def run_words(tiny_model, reviews, tmp_path):
    return words(tiny_model, reviews, tmp_path / "run")


def wait_for_updates(folder, count, seconds=120, meanwhile=lambda: None):
    """Return when the run has logged `count` updates."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        meanwhile()
        time.sleep(0.01)
    pytest.fail("the run did not get so far")


def trainers(process):
    """The processes that train, below a launcher."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return [p for p in family if any(word.endswith("train.py") for word in p.cmdline()[1:3])]


def ends_as_if_never_stopped(command, run_words, folder, whole):
    done = launch(command, [*run_words, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert without_timing(folder) == without_timing(whole)
    assert same_bits(folder / "final", whole / "final")
    assert same_bits(folder / "best", whole / "best")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.case(
    "SIGTERM, SIGINT, SIGUSR1 or SIGHUP to a run on one process",
    "saved after the running update, exit 75; resumed, the end is bit-identical to a run that nobody stopped",
)
def test_a_signal_saves_and_exits_with_75(started, run_words, tmp_path, whole, number):
    process = started(ONE if number in (signal.SIGTERM, signal.SIGHUP) else FORK, run_words)
    wait_for_updates(tmp_path / "run", 20)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert f"({number.name})" in out and "Traceback" not in err
    step = metrics_of(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    ends_as_if_never_stopped(FORK, run_words, tmp_path / "run", whole)


@pytest.mark.case(
    "Ctrl-C that ends the reader of the run's output, too (`tee log`)",
    "saved after the running update, exit 75",
)
def test_a_run_to_which_nobody_listens_any_more_saves(started, run_words, tmp_path):
    process = started(ONE, run_words)
    wait_for_updates(tmp_path / "run", 20)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    step = metrics_of(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]


@pytest.mark.parametrize(
    "command",
    [ONE, ACCELERATE, [*TORCHRUN, "2"], ["nohup", *TORCHRUN, "2"]],
    ids=["alone", "accelerate", "torchrun", "nohup torchrun"],
)
@pytest.mark.case(
    "the terminal of the run is closed, or its connection lost; of several processes, under nohup, too",
    "saved after the running update",
)
def test_a_closed_terminal_loses_nothing(command, run_words, tmp_path):
    terminal, side_of_run = pty.openpty()
    process = subprocess.Popen(
        [*command, ROOT / "train.py", *run_words, "--dataloader_num_workers", "1"], cwd=tmp_path,
        stdin=side_of_run, stdout=side_of_run, stderr=side_of_run,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(side_of_run)
    os.set_blocking(terminal, False)

    def read() -> None:
        with contextlib.suppress(OSError):  # nothing to read; under nohup, all write elsewhere
            os.read(terminal, 2**16)

    try:
        wait_for_updates(tmp_path / "run", 20, meanwhile=read)
        family = trainers(process)
        os.close(terminal)
        assert all_ended(family, 60) and (command != ONE or process.wait(timeout=60) == 75)
    finally:
        kill_launch(process)
    step = metrics_of(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]


@pytest.mark.case("the same to a run of one process that nohup has started", "it goes on")
def test_nohup_has_a_run_go_on_when_its_terminal_is_closed(run_words, started, tmp_path):
    process = started(["nohup", *ONE], run_words)
    wait_for_updates(tmp_path / "run", 20)
    process.send_signal(signal.SIGHUP)
    wait_for_updates(tmp_path / "run", len(metrics_of(tmp_path / "run")) + 20)
    assert process.poll() is None


@pytest.mark.case(
    "SIGTERM to `accelerate launch` with one process",
    "the training process follows after saving; resumed, the end is bit-identical",
)
def test_a_launcher_with_one_process_that_ends_leaves_no_orphan_and_loses_nothing(
    started, run_words, tmp_path, whole
):
    process = started(ACCELERATE, run_words)
    wait_for_updates(tmp_path / "run", 20)
    (trainer,) = [p for p in trainers(process) if p.pid != process.pid]
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert all_ended([trainer], 60)
    assert list((tmp_path / "run/checkpoints").glob("step-*"))
    ends_as_if_never_stopped(FORK, run_words, tmp_path / "run", whole)


@pytest.mark.parametrize("told", ["launcher", "one process", "all"])
@pytest.mark.case(
    "a signal to the launcher of two processes, to one of them, or to all",
    "both save the same update, once",
)
def test_two_processes_save_together_whoever_got_the_signal(started, run_words, tmp_path, told):
    # The launcher and Slurm also send theirs to the loader's workers.
    command = FORKS if told == "one process" else [*TORCHRUN, "2"]
    process = started(command, [*run_words, "--dataloader_num_workers", "1"])
    wait_for_updates(tmp_path / "run", 20)
    both = psutil.Process(process.pid).children()
    assert len(both) == 2
    if told == "one process":
        both[1].send_signal(signal.SIGUSR1)
    elif told == "launcher":
        process.send_signal(signal.SIGTERM)
    else:  # as Slurm does; the launcher then forwards its own to both, which must not end them
        for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
            one.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert "stopped after update" in out, err
    step = metrics_of(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]


# Each batch of an evaluation waits.
SLOW_EVALUATION = """
from ft.signals import noted_signal
from ft.tasks.text_classification import TextClassification as Task
predict = Task.predict
def slowly(*args):
    print("scoring", flush=True)
    {wait}
    return predict(*args)
Task.predict = slowly
"""


@pytest.fixture
def start_slow_evaluation(started, run_words, tmp_path):
    def start(wait):
        script = changed_train(tmp_path / "slow.py", SLOW_EVALUATION.format(wait=wait))
        return started(ONE, run_words, script=script)

    return start


def wait_for_line(stream, text):
    said = ""
    for line in stream:
        said += line
        if text in line:
            return
    pytest.fail(f"it never said {text!r}, but: {said}")


@pytest.mark.case(
    "SIGTERM in the middle of an evaluation",
    "the update is saved, exit 75; resumed, the evaluation comes first, and the end is bit-identical",
)
def test_in_the_middle_of_an_evaluation_too(start_slow_evaluation, run_words, tmp_path, whole):
    process = start_slow_evaluation("while noted_signal() is None: time.sleep(0.01)")
    wait_for_line(process.stdout, "scoring")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "scoring" not in out  # after the first of eight batches
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000007"]
    ends_as_if_never_stopped(FORK, run_words, tmp_path / "run", whole)


def told_in_call(monkeypatch, name, number):
    """Ask the run to stop in the n-th call of a function of its task."""
    original, calls = getattr(TextClassification, name), []

    def call(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(TextClassification, name, call)


def fail_saves(monkeypatch, step, times):
    """Make writing the checkpoint of a step fail `times` times."""
    original, left = ft.saver.write_checkpoint, [OSError(5, "Input/output error")] * times

    def write(folder, state, progress, *rest):
        if left and progress["step"] == step:
            raise left.pop()
        original(folder, state, progress, *rest)

    monkeypatch.setattr(ft.saver, "write_checkpoint", write)


@pytest.fixture
def short(base_flags, tmp_path):
    """A run of 6 updates with a checkpoint every third, which was not stopped, and the flags for the same in
    another folder. Its best model is not the last."""
    words = {
        **base_flags, "max_train_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 50,
        "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss",
    }  # fmt: skip
    assert train_here(**{**words, "output_dir": tmp_path / "short"}) == 0
    return tmp_path / "short", words


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.case(
    "SIGTERM in an update whose save fails, and fails again",
    "saved at the next try, exit 75; resumed, the end is bit-identical",
)
def test_told_to_stop_a_run_tries_a_save_again_that_has_failed(short, tmp_path, monkeypatch, times):
    whole, words = short
    with monkeypatch.context() as patch:
        told_in_call(patch, "loss", 3)
        fail_saves(patch, 3, times)
        assert train_here(**words) == 75
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000003"]
    assert train_here(**words, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", tmp_path / "run/final")


@pytest.mark.case(
    "SIGTERM while the best model scores the test rows, after the last save has failed",
    "the last model is saved, not the best; exit 75",
)
def test_a_save_that_is_tried_again_is_of_the_last_model(short, tmp_path, monkeypatch):
    whole, words = short
    assert json.loads((whole / "results.json").read_text())["best/step"] == 2
    told_in_call(monkeypatch, "predict", 4)  # each split is one batch: validation three times, then test
    fail_saves(monkeypatch, 6, 1)
    assert train_here(**words) == 75
    last = "checkpoints/step-00000006"
    assert same_bits(whole / last, tmp_path / "run" / last)


@pytest.mark.case(
    "a second SIGTERM",
    "the process ends at once, without saving",
)
def test_a_second_signal_ends_at_once(start_slow_evaluation, tmp_path):
    process = start_slow_evaluation("time.sleep(30)")
    wait_for_updates(tmp_path / "run", 7)
    process.send_signal(signal.SIGTERM)
    wait_for_line(process.stderr, "a second signal ends at once")
    time.sleep(1.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - begin < 5
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def is_init(number):
    """Whether it is process 1, and that one known as no launcher: what an orphan is told by."""
    with contextlib.suppress(OSError):
        return number == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    return False


@pytest.mark.case(
    "a launcher that was killed before the process it started could look at it",
    "the process ends at once, and does not wait for the others of its run",
)
def test_an_orphan_from_the_start_ends(run_words, tmp_path):
    environment = {
        "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999",
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *run_words])
    said = shlex.quote(str(tmp_path / "said"))
    shell = ["sh", "-c", f"(sleep 1; exec {command}) >{said} 2>&1 & echo $!"]
    done = subprocess.run(shell, capture_output=True, text=True, env={**os.environ, **environment})
    process = psutil.Process(int(done.stdout))
    if not is_init(process.ppid()):
        process.kill()
        pytest.skip("orphans are known by process 1 as parent; here that is systemd --user, or a Python")
    if not all_ended([process], 60):
        process.kill()
        pytest.fail((tmp_path / "said").read_text())
    assert (tmp_path / "said").read_text() == ""  # it did not fail either
