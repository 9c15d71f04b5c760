"""Two hosts, as network namespaces with a virtual cable: the same result, and recovery after a loss."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from compare import same_bits, without_timing
from conftest import ACCELERATE, FORK, FORKS, ROOT, flags, launch, wait_for
from safetensors.torch import load_file, save_file

from ft.launch import kill_launch
from ft.verify import compare

ADDRESSES = ("10.77.0.1", "10.77.0.2")
APART = str(ROOT / "tests" / "apart.py")  # train.py: network namespaces share memory


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two network namespaces."""
    names = [f"ft-{os.getpid()}-{number}" for number in (0, 1)]  # two suites may run at once
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", names[0], check=False).returncode:
        pytest.skip("network namespaces cannot be made here (needs root, iproute2 and the right to)")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "eth-ft0", "netns", names[0], "type", "veth", "peer", "eth-ft1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"eth-ft{number}")
            ip("-n", name, "link", "set", f"eth-ft{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            for process in ip("netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", name, check=False)


def start(name, number, command):
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": f"eth-ft{number}"},
    )  # fmt: skip


def end(processes, timeout=240):
    """What each process printed; one that hangs fails the test with the output of all."""
    limit, said, hung = time.monotonic() + timeout, [], False
    for process in processes:
        try:
            said.append(process.communicate(timeout=max(0, limit - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            kill_launch(process)
            hung = True
            said.append(process.communicate(timeout=10)[0])
    assert not hung, "hung:\n" + "\n---\n".join(said)
    return said


def config(base_flags, folder):
    return {
        **base_flags, "output_dir": folder, "max_train_steps": 60, "num_train_epochs": 20,
        "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps", "save_steps": 7,
    }  # fmt: skip


def launched_on(hosts, tmp_path, words, *own, behind=()):
    """Accelerate's launcher on each host; `own` are the flags of each, `behind` the command that starts that
    of the second."""
    topology = yaml.safe_load((ROOT / "accelerate_configs" / "multi_node.yaml").read_text())
    topology |= {"use_cpu": True, "mixed_precision": "no"}
    del topology["gpu_ids"]
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump(topology))
    launcher = [
        "--config_file", str(tmp_path / "nodes.yaml"), "--num_machines", "2", "--num_processes", "2",
        "--main_process_ip", ADDRESSES[0], "--main_process_port", "29555",
    ]  # fmt: skip
    script = [APART, *flags(**words)]
    return [
        start(
            name, number,
            [*(behind if number else ()), *ACCELERATE, *launcher, "--machine_rank", str(number), *script,
             *flags(**mine)],
        )
        for number, (name, mine) in enumerate(zip(hosts, own or ({}, {}), strict=True))
    ]  # fmt: skip


OPTIONS = {
    "config_overrides": ({}, {"config_overrides": "hidden_dropout_prob=0"}),
    "num_seeds": ({}, {"num_seeds": 2}),
    "preflight": ({"preflight": True}, {}),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_a_process_with_another_option_is_refused(base_flags, tmp_path, what):
    """Each host is launched by a command of its own. What was typed is compared before anything is read; two
    processes of one host suffice to test it."""
    (tmp_path / "own.json").write_text(json.dumps([flags(**mine) for mine in OPTIONS[what]]))
    words = [str(tmp_path / "own.json"), *flags(**config(base_flags, tmp_path / "two"))]
    done = launch(FORKS, words, script="tests/own.py")
    assert done.returncode
    assert f"{what}: process 1 of 2 differs from process 0" in done.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("what", ["pretrained model", "choice of word embeddings", "data"])
def test_a_host_with_another_model_or_other_data_is_refused(
    base_flags, tiny_model, reviews, tmp_path, hosts, what
):
    if what == "pretrained model":  # of the same shapes
        other = shutil.copytree(tiny_model, tmp_path / "other")
        weights = load_file(other / "model.safetensors")
        save_file({n: w + 1 for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    elif what == "choice of word embeddings":  # other short rows are tried
        other = shutil.copytree(tiny_model, tmp_path / "other")
        about = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(about | {"eos_token_id": 3}))
    else:
        other = shutil.copytree(reviews, tmp_path / "other")
        shutil.copy(other / "validation.csv", other / "test.csv")
    name, mine = ("dataset_name", reviews) if what == "data" else ("model_name_or_path", tiny_model)
    own = {name: mine}, {name: other}
    processes = launched_on(hosts, tmp_path, config(base_flags, tmp_path / "two"), *own)
    said = end(processes)
    assert all(process.returncode for process in processes)
    assert f"{what}: process 1 of 2 differs from process 0" in said[0]
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


@pytest.mark.case("the run on two hosts (network namespaces)", "what one process gives, within 1e-5")
def test_two_hosts_give_what_one_process_gives(base_flags, tmp_path, hosts):
    processes = launched_on(hosts, tmp_path, config(base_flags, tmp_path / "two"))
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "2 processes x 16 rows" in said[0]
    done = launch(FORK, flags(**config(base_flags, tmp_path / "one")))
    assert done.returncode == 0, done.stderr
    found = compare(tmp_path / "one", tmp_path / "two")
    assert found.first == "" and found.rows_scored == (61, 61)


def test_a_host_with_another_checkpoint_in_the_same_place_is_refused(base_flags, tmp_path, hosts):
    one = config(base_flags, tmp_path / "one")
    done = launch(FORK, flags(**one))
    assert done.returncode == 0, done.stderr
    place = tmp_path / "one/checkpoints/step-00000056"
    other = shutil.copytree(place, tmp_path / "other")
    (other / "manifest.json").write_text("{}")
    words = {**one, "output_dir": tmp_path / "two", "resume_from_checkpoint": place}
    mounted = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(other), str(place)]
    processes = launched_on(hosts, tmp_path, words, behind=mounted)
    said = end(processes)
    assert all(process.returncode for process in processes)
    assert f"resume_from_checkpoint: {place}: process 1 of 2 differs from process 0" in said[0]
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


def elastic(hosts, words):
    """A launcher on each host that restarts its process, up to three times."""
    return [
        start(
            name, number,
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
             "--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_id", "try",
             "--rdzv_endpoint", f"{ADDRESSES[0]}:29556", "--rdzv_conf", f"is_host={1 - number}",
             "--local_addr", ADDRESSES[number], APART, *words,
             "--resume_from_checkpoint", "latest"],
        )
        for number, name in enumerate(hosts)
    ]  # fmt: skip


@pytest.mark.case(
    "SIGKILL to the process of one of two hosts, under torchrun's `--max_restarts`",
    "all start again by themselves from the last checkpoint; the end is bit-identical",
)
def test_a_lost_process_comes_back_from_the_last_checkpoint(base_flags, tmp_path, hosts):
    done = launch(FORKS, flags(**config(base_flags, tmp_path / "whole")), script=APART)
    assert done.returncode == 0, done.stderr
    processes = elastic(hosts, flags(**config(base_flags, tmp_path / "run")))
    wait_for(tmp_path / "run/checkpoints/latest", processes[0])
    (lost,) = psutil.Process(processes[1].pid).children()
    lost.kill()
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "resumed from" in said[0]
    assert same_bits(tmp_path / "whole/final", tmp_path / "run/final")
    assert without_timing(tmp_path / "whole") == without_timing(tmp_path / "run")
