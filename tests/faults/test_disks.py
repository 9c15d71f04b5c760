"""Full, read-only or damaged disks, and folders that two runs want at once."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from compare import same_bits, without_timing
from conftest import DAMAGE, FORK, flags, launch, train_here
from prepared import Prepared

from ft.checkpoint import FILES, checkpoints_in
from ft.data.prepare import cache_root
from ft.durable import find_damage


@pytest.fixture
def mount(tmp_path):
    """Mounts a small separate file system; needs root."""
    mounted = []

    def do(name, *options):
        place = tmp_path / name
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield do
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.case(
    "a disk (tmpfs) that is full after some checkpoints",
    "a warning for each that fails, then exit 2; what stands is whole, and resuming with more room ends "
    "bit-identical",
)
def test_a_full_disk(base_flags, tmp_path, mount):
    words = {**base_flags, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 50}
    words |= {"eval_strategy": "steps", "eval_steps": 14}
    assert train_here(**{**words, "output_dir": tmp_path / "whole"}) == 0
    small = mount("small", "size=1m")
    done = launch(FORK, flags(**{**words, "output_dir": small / "run"}))
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"\(0\.\d MB were free on the disk\)", done.stderr) and "Traceback" not in done.stderr
    assert "warning: output_dir: the checkpoint of update" in done.stderr
    stand = checkpoints_in(small / "run/checkpoints")
    assert stand and all(find_damage(place, *FILES) == "" for place in stand)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
    again = {**words, "output_dir": small / "run", "resume_from_checkpoint": "latest"}
    assert train_here(**again) == 0
    assert same_bits(tmp_path / "whole/final", small / "run/final")
    assert without_timing(tmp_path / "whole") == without_timing(small / "run")


@pytest.mark.case(
    "the disk does not take the rows of metrics.jsonl at one save (its fsync fails)",
    "a warning; the run goes on, and the later checkpoints stand",
)
def test_rows_that_the_disk_does_not_take_cost_no_more_than_that_checkpoint(
    base_flags, tmp_path, monkeypatch, capfd
):
    path, fsync, failed = tmp_path / "run/metrics.jsonl", os.fsync, []

    def fail_once(handle):
        if not failed and path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            failed.append(handle)
            raise OSError(5, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail_once)
    words = {"max_train_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 50}
    assert train_here(**base_flags, **words) == 0
    said = "the checkpoint of update 2 cannot be written: [Errno 5] Input/output error: "
    assert f"warning: output_dir: {said}'{path}'" in capfd.readouterr().err
    names = sorted(place.name for place in (tmp_path / "run/checkpoints").glob("step-*"))
    assert names == ["step-00000004", "step-00000006"]


@pytest.mark.case(
    "an output_dir on a read-only disk", "exit 2 before any training; the message names output_dir"
)
def test_a_read_only_output_dir(base_flags, mount):
    place = mount("locked", "ro")
    done = launch(FORK, flags(**{**base_flags, "output_dir": place / "run"}))
    assert done.returncode == 2 and "error: output_dir" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""  # the summary is printed before the first update


SHORT = {"max_train_steps": 3, "save_strategy": "no"}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, tiny_model, reviews):
    """A folder with a run and the HF_HOME in which it has encoded its data. Must not be changed."""
    folder = tmp_path_factory.mktemp("encoded")
    words = {"model_name_or_path": tiny_model, "dataset_name": reviews, "learning_rate": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        assert train_here(**words, **SHORT, logging_steps=1, output_dir=folder / "run") == 0
    return folder


@pytest.mark.case(
    "each file of the encoding cache cut short, emptied, deleted, or with one bit flipped",
    "encoded anew; the same trajectory",
)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train.arrow", "validation.arrow", "data.json", "manifest.json"])
def test_a_damaged_encoding(base_flags, encoded, tmp_path, monkeypatch, name, damage):
    monkeypatch.setenv("HF_HOME", str(shutil.copytree(encoded / "home", tmp_path / "home")))
    (folder,) = [path for path in cache_root().iterdir() if path.is_dir()]
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGE[damage](folder / name)
    assert train_here(**base_flags, **SHORT) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert without_timing(encoded / "run") == without_timing(tmp_path / "run")


@pytest.mark.case(
    "two runs that encode the same data at once", "both end with the same; the data is encoded once"
)
def test_two_runs_encode_at_once(started, base_flags, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "before"))
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda _: Prepared(tokenizer, dataset_name=base_flags["dataset_name"]), range(2))
        assert sum(one.encoded for one in both) == 203 + 61 + 47
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    processes = [started(FORK, flags(**{**base_flags, "output_dir": tmp_path / name})) for name in ("a", "b")]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert same_bits(tmp_path / "a/final", tmp_path / "b/final")
    assert len([path for path in cache_root().iterdir() if path.is_dir()]) == 1
    shutil.rmtree(tmp_path / "home")
