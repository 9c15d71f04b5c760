"""`train.py --verify` on real launches: equal results are reported equal, and differences are named."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from conftest import ONE, all_ended, flags, launch, train_here

from ft.cli import parse
from ft.config import Config
from ft.errors import UserError
from ft.runtime import resolve_batch_size
from ft.verify import _Matrix, compare


@pytest.mark.timeout(1200)
def test_a_config_that_keeps_the_promise_exits_with_0(base_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONVERBOSE", "1")  # the launches print more than a pipe holds
    done = launch(ONE, [*flags(**base_flags), "--verify"], timeout=1000)  # seven launches
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"[12] process", line)]
    assert len(rows) == 5 and all(line.endswith(" 61") for line in rows)  # every validation row
    assert "the same: within 1e-05" in done.stdout
    assert not (tmp_path / "run").exists()


def test_several_processes_do_not_each_verify(base_flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run it directly"):
        train_here(**base_flags, verify=True)


def test_an_interrupt_ends_the_launch_that_is_under_way(base_flags, tmp_path, monkeypatch):
    config, ranks, wait = parse(Config, flags(**base_flags)), [], subprocess.Popen.wait
    resolve_batch_size(config, 1)

    def interrupted(launcher):
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        deadline = time.monotonic() + 120
        while len(ranks) < 2 and time.monotonic() < deadline:
            ranks[:] = psutil.Process(launcher.pid).children()
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _Matrix(config, tmp_path)._launch(tmp_path / "two", processes=2)
    assert len(ranks) == 2 and all_ended(ranks, 0)


@pytest.mark.usefixtures("heeds_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_launch_and_no_folder(base_flags, tmp_path, started, number):
    place = tmp_path / "temporary"
    place.mkdir()
    process = started(ONE, [*flags(**base_flags), "--verify"], TMPDIR=str(place))
    launches, deadline = [], time.monotonic() + 120
    while len(launches) < 2 and time.monotonic() < deadline:  # a launcher, and what it has started
        launches = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.02)
    assert list(place.glob("verify-*"))
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "Traceback" not in err
        assert len(launches) >= 2 and all_ended(launches, 0)
        assert not list(place.glob("verify-*"))
    finally:
        for one in launches:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def test_torchs_own_dropout_is_found_out_and_the_first_difference_named(base_flags, monkeypatch, capfd):
    """The launches are runs in this process, all on one process with whole or split updates."""

    def here(self, place, processes=1, words=()):
        options = dict(zip([word.lstrip("-") for word in words[::2]], words[1::2], strict=True))
        asked = base_flags | {"dropout_mode": "torch", "max_train_steps": 8, "save_steps": 4}
        asked |= {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 4}
        assert train_here(**asked | options | {"output_dir": place}) == 0

    monkeypatch.setattr(_Matrix, "_launch", here)
    monkeypatch.setattr(_Matrix, "_launch_and_kill", lambda self, place: here(self, place))
    assert train_here(**base_flags, dropout_mode="torch", verify=True) == 1
    out = capfd.readouterr().out
    assert re.search(r"NOT THE SAME: 1 process, micro-batches of 8: differs first at update 1: loss \(", out)
    assert "NOT THE SAME: 2 processes, micro-batches of 8: differs first at update 1: " in out
    assert "killed and resumed: differs" not in out and "the same: within" not in out


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, reviews):
    """A run of 4 updates. Must not be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = {"model_name_or_path": tiny_model, "dataset_name": reviews, "learning_rate": 1e-3}
    assert train_here(**words, logging_steps=1, max_train_steps=4, output_dir=folder) == 0
    return folder


@pytest.fixture
def pair(run, tmp_path):
    """The run and a copy, to be changed."""
    return run, shutil.copytree(run, tmp_path / "other")


def change(folder, key, factor):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [{**row, key: row[key] * factor} if key in row and row["step"] >= 3 else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))


@pytest.mark.parametrize(
    ("key", "name"),
    [("train/loss", "loss"), ("train/grad_norm", "gradient norm"), ("train/learning_rate", "learning rate")],
)
def test_the_first_update_and_quantity_that_differ_are_named(pair, key, name):
    assert compare(*pair).first == ""
    change(pair[1], key, 1 + 3e-5)
    assert compare(*pair).first.startswith(f"update 3: {name}")


def test_rows_that_were_not_scored_are_found(pair):
    change(pair[1], "eval/rows", 2)
    assert compare(*pair).first == "update 4: rows scored"
