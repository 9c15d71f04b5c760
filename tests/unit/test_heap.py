"""A run on a CPU keeps its memory, and does not need more from update to update."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ft.heap import SETTINGS, TUNABLES

BEGINNING = "import sys; from ft.heap import settle_heap; settle_heap()\n"
TELL = "import json, os; print(json.dumps([os.environ.get('GLIBC_TUNABLES', ''), sys.argv[1:], os.getpid()]))"
MEMORY = """
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def update(length):
    model(input_ids=torch.randint(0, 100, (4, length))).logits.sum().backward()
    model.zero_grad()


torch.set_num_threads(1)
random.seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
config = BertConfig(vocab_size=100, **sizes)
model = BertForSequenceClassification(config)
before = memory("VmRSS")
for _ in range(3):
    update(256)
longest = memory("VmHWM")
for _ in range(60):
    update(random.randint(60, 256))
print((memory("VmHWM") - before) / (longest - before))
"""
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.path.exists("/dev/nvidiactl"),
    reason="a script leaves its heap as it is where there is a GPU, and on another system than Linux",
)


def say(tmp_path, text, *words, **environment):
    """What a script that begins with `settle_heap` prints, as JSON, and its process id."""
    (tmp_path / "script.py").write_text(BEGINNING + text)
    plain = {name: value for name, value in os.environ.items() if name != TUNABLES}
    with subprocess.Popen(
        [sys.executable, "-B", "-X", "dev", "-Wignore::ImportWarning", tmp_path / "script.py", *words],
        env={**plain, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out), process.pid


def test_a_script_starts_once_more_with_its_words_as_the_same_process(tmp_path):
    (tunables, words, process), started = say(tmp_path, TELL, "--learning_rate", "1e-4", "two words")
    assert tunables.split(":") == [f"{name}={value}" for name, value in SETTINGS.items()]
    assert words == ["--learning_rate", "1e-4", "two words"] and process == started


@pytest.mark.parametrize("word", ["{}", "--config={}"])
def test_a_config_from_a_pipe_is_read_once_and_so_nothing_starts_again(tmp_path, word):
    os.mkfifo(tmp_path / "pipe")
    (tunables, *_), _ = say(tmp_path, TELL, word.format(tmp_path / "pipe"))
    assert tunables == ""


@pytest.mark.parametrize("told", ["true", "false"])
def test_a_launch_for_the_cpu_beside_a_gpu_has_the_heap(tmp_path, told):
    gpu = "import os.path as path; there = path.exists\n"
    gpu += "path.exists = lambda name: name == '/dev/nvidiactl' or there(name)\n"
    (tmp_path / "gpu.py").write_text(gpu)
    (tmp_path / "script.py").write_text("import gpu\n" + BEGINNING + TELL)
    known = (TUNABLES, "CUDA_VISIBLE_DEVICES")
    plain = {name: value for name, value in os.environ.items() if name not in known}
    done = subprocess.run(
        [sys.executable, "script.py"],
        env={**plain, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": told},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert bool(json.loads(done.stdout)[0]) == (told == "true"), done.stderr


def test_settings_of_the_user_stay(tmp_path):
    mine = "glibc.malloc.tcache_count=3:glibc.malloc.perturb=7"
    (tunables, *_), _ = say(tmp_path, TELL, **{TUNABLES: mine})
    assert tunables.startswith(f"{mine}:") and tunables.count("tcache_count") == 1
    assert "glibc.malloc.mxfast=0" in tunables


@pytest.mark.parametrize(
    "words, text",
    [
        (["late.py"], "import sys; sys.modules['torch'] = None\n"),  # something is under way
        (["late.py"], "import sys; sys.settrace(lambda *args: None)\n"),  # a debugger
        (["late.py"], "import sys; sys.argv = ['train.py']\n"),  # a notebook that runs a file
        (["-m", "late"], ""),
        (["-m", "runpy", "late.py"], ""),
        (["-Bmrunpy", "late.py"], ""),
        (["-c", "import late"], ""),
    ],
)
def test_a_program_that_is_no_script_just_started_is_left_alone(tmp_path, words, text):
    (tmp_path / "late.py").write_text(text + BEGINNING + TELL)
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    done = subprocess.run(
        [sys.executable, *words],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(done.stdout)[0] == "", done.stderr


def test_updates_of_changing_lengths_need_no_more_memory_than_the_longest(tmp_path):
    """Without the settings, it was 1.3 times as much after sixty updates (glibc 2.36)."""
    more, _ = say(tmp_path, MEMORY)
    assert more < 1.15
