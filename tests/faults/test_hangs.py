"""A process that hangs, dies or fails alone ends the whole job, promptly and with the reason."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import FORK, FORKS, ROOT, TORCHRUN, changed_train, flags, launch

# In the fifth micro-batch of one process.
FAULTY = """
from ft.tasks.text_classification import TextClassification as Task
loss, calls = Task.loss, []
def faulty(self, model, batch):
    calls.append(1)
    if len(calls) == 5 and os.environ.get("RANK", "0") == {rank!r}:
        {fault}
    return loss(self, model, batch)
Task.loss = faulty
"""


PATIENCE = "10s"  # more than the first update takes on a busy machine


@pytest.fixture
def run_faulty(base_flags, tmp_path):
    def run(command, fault, rank="0", **changes):
        """The finished launch, and the seconds from the fault to its end."""
        place = tmp_path / "now"
        change = FAULTY.format(fault=f"open({str(place)!r}, 'w'); {fault}", rank=rank)
        script = changed_train(tmp_path / "faulty.py", change)
        done = launch(command, flags(**base_flags, **changes), script=script)
        return done, time.time() - place.stat().st_mtime

    return run


@pytest.mark.case(
    "a process hangs in an update",
    "ends with an error after `hang_timeout`; its stacks show where",
)
def test_a_hang_ends_with_an_error_and_the_stacks(run_faulty):
    """There is no other process to wait for."""
    hang = "import ft.watchdog; ft.watchdog.LINGER_SECONDS = 0.5; time.sleep(600)"
    done, _ = run_faulty(FORK, hang, hang_timeout=PATIENCE)
    assert done.returncode == 1
    said = "error: hang_timeout: process 0: nothing finished for 10 s; the last was: update 4"
    assert said in done.stderr
    assert "in faulty" in done.stderr  # where it hangs


@pytest.mark.case(
    "one of two processes hangs",
    "both print their stacks and end",
)
def test_every_process_shows_its_stacks(run_faulty):
    done, _ = run_faulty(FORKS, "time.sleep(600)", rank="1", hang_timeout=PATIENCE)
    assert done.returncode == 1
    assert "hang_timeout: process 0" in done.stderr and "hang_timeout: process 1" in done.stderr
    assert "in faulty" in done.stderr
    assert done.stderr.count("(most recent call first)") >= 4  # two threads of each, at least


# A process under a one-second watchdog, which waits, then takes eight steps of half a second.
WATCHED = """
import sys, time
import ft.watchdog
ft.watchdog.LINGER_SECONDS = float(sys.argv[1])
watchdog = ft.watchdog.Watchdog(1.0, 0)
print("begun", flush=True)
time.sleep(float(sys.argv[2]))
for number in range(8):
    watchdog.alive(f"step {number}")
    for _ in range(10):
        time.sleep(0.05)
"""


@pytest.fixture
def start_watched():
    processes = []

    def start(linger, wait):
        words = [sys.executable, "-c", WATCHED, str(linger), str(wait)]
        process = subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in processes:
        process.kill()


@pytest.mark.case(
    "a process is suspended (SIGSTOP) for longer than `hang_timeout`, and continued",
    "it goes on",
)
def test_time_in_which_a_process_is_suspended_is_no_hang(start_watched):
    process = start_watched(linger=0.5, wait=0)
    time.sleep(0.1)  # in the middle of the first step
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""


@pytest.mark.case(
    "a process comes out of a hang while the stacks are being shown",
    "it goes on, and says so",
)
def test_a_hang_that_ends_while_its_stacks_are_shown_ends_nothing(start_watched):
    process = start_watched(linger=4, wait=3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "error: hang_timeout: process 0: nothing finished for 1 s; the last was: start" in err
    assert "finished after all; the run continues" in err and err.count("hang_timeout") == 2


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (FORKS, "raise RuntimeError('broken on purpose')"),
        ([*TORCHRUN, "2"], "os.kill(os.getpid(), 9)"),
    ],
    ids=["an error", "a kill"],
)
@pytest.mark.case(
    "one of two processes raises an error, or is killed, before a collective",
    "the job ends within a minute; the error's own traceback comes first",
)
def test_a_process_that_dies_takes_the_others_down(run_faulty, command, fault):
    done, seconds = run_faulty(command, fault, rank="1")
    assert done.returncode == 1
    assert seconds < 60
    if "broken" in fault:
        first = done.stderr.index("Traceback")
        assert "broken on purpose" in done.stderr[first:].split("Traceback")[1]


# After the forward pass of an update's only micro-batch: gradients may have been sent.
OUT_OF_MEMORY = "loss(self, model, batch); import torch; raise torch.OutOfMemoryError('none left')"


@pytest.mark.case(
    "one of two processes alone comes upon an error of the user's, such as memory that runs out for good",
    "exit 2 of that process; the message is printed once and says its rank",
)
def test_an_error_on_one_process_alone_is_said_once_with_its_rank(run_faulty):
    done, seconds = run_faulty([*TORCHRUN, "2"], OUT_OF_MEMORY, rank="1")
    assert done.returncode == 1 and seconds < 60
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: rank 1 of 2: per_device_train_batch_size: out of")
    assert "exitcode  : 2" in done.stderr and "none left" not in done.stderr
