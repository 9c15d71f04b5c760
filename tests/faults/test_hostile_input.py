"""Malicious input, or input that looks like it."""

import csv
import json
import os
import pickle
import shutil
import time

import pytest
import torch
from conftest import FORK, ONE, changed_train, flags, launch, make_rows, train_here, write_csv
from safetensors.torch import load_file

from ft.data import files
from ft.errors import UserError
from ft.tasks.text_classification import TextClassification


class Harm:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.fixture
def pickled(tiny_model, tmp_path):
    """The tiny model with its weights in a pickle."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


SHORT = {"max_train_steps": 2, "save_strategy": "no"}


@pytest.mark.case(
    "a model folder with a pickle instead of safetensors", "exit 2; with `allow_pickle` its tensors are read"
)
def test_a_pickle_is_refused_unless_asked_for(base_flags, pickled):
    words = {**base_flags, **SHORT, "model_name_or_path": pickled}
    with pytest.raises(UserError, match=r"model_name_or_path: .*in a pickle.*allow_pickle"):
        train_here(**words)
    assert train_here(**words, allow_pickle=True) == 0


@pytest.mark.case(
    "a pickle that runs a program when it is read, with `allow_pickle`", "exit 2; nothing of it ran"
)
def test_a_pickle_with_a_program_runs_nothing(base_flags, pickled, tmp_path):
    content = {**torch.load(pickled / "pytorch_model.bin"), "harm": Harm(tmp_path / "harm")}
    torch.save(content, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model_name_or_path: .*cannot be loaded"):
        train_here(**{**base_flags, **SHORT, "model_name_or_path": pickled, "allow_pickle": True})
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(UserError, match=r"model_name_or_path: .*cannot be loaded"):
        train_here(**{**base_flags, **SHORT, "model_name_or_path": pickled, "allow_pickle": True})
    assert not (tmp_path / "harm").exists()


@pytest.mark.case("a config.json that asks for the model's own code", "exit 2; nothing of it ran")
def test_remote_code_is_refused(base_flags, tiny_model, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model, folder)
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    done = launch(FORK, flags(**{**base_flags, **SHORT, "model_name_or_path": folder}))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: model_name_or_path" in done.stderr and "trust_remote_code" in done.stderr
    assert not (tmp_path / "harm").exists()


@pytest.mark.case("a YAML file that builds a Python object", "exit 2; nothing of it ran")
def test_a_yaml_file_builds_no_python_objects(tmp_path):
    harm = tmp_path / "harm"
    (tmp_path / "run.yaml").write_text(f"seed: !!python/object/apply:os.system ['touch {harm}']\n")
    done = launch(FORK, [str(tmp_path / "run.yaml")])
    assert done.returncode == 2 and "is not plain YAML" in done.stderr and "Traceback" not in done.stderr
    assert not harm.exists()


BROKEN = {
    "a NUL byte": (b"a\x00b,good\n", "line 22: holds a NUL byte"),
    "nothing but NUL bytes": (b"\x00" * 500 + b"\n", "line 22: holds a NUL byte"),
    "a line of Latin-1": ("schön,good\n".encode("latin-1"), r"line 22: byte 4 \(0xf6\) is not UTF-8"),
    "a part in UTF-16": ("schön,good\n".encode("utf-16"), "line 22: byte 1 .* is not UTF-8"),
    "an endless quote": (b'"' + b"word \n" * 300, "a quoted field is not closed"),
    "an endless line": (b"word " * 1000, "line 22: is longer than 2,000 characters"),
}


@pytest.mark.case(
    "a csv with NUL bytes, mixed encodings, an endless quoted field or line (a gigabyte costs no more)",
    "exit 2 before it is read on; the message names the line",
)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_csv_names_its_line(base_flags, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "LONGEST_TEXT", 2000)
    content, message = BROKEN[kind]
    path = write_csv(tmp_path / "train.csv", make_rows(20))
    path.write_bytes(path.read_bytes() + content)
    words = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    with pytest.raises(UserError, match=message):
        train_here(**words, train_file=path)


TEXTS = [
    "<script>alert(1)</script>", "=CMD('x')", "+1+1", "@SUM(A1)", "\x1b[31mred\x1b[0m", "bell\x07",
    "\u202eevil\u202c", "](javascript:alert(1))",
]  # fmt: skip
LABELS = ["../../x", "<b>&amp;", "\x1b[2Jclear", "\u202eturned", "x" * 300]


@pytest.mark.case(
    "texts and labels with HTML, formulas, control and right-to-left characters, and a label `../../x`",
    "trained and exported; quoted or escaped wherever they are written, nothing outside of output_dir",
)
def test_texts_and_labels_give_nobody_orders(base_flags, tmp_path):
    inside = tmp_path / "deep" / "er"
    rows = [
        {"text": f"{TEXTS[n % len(TEXTS)]} number {n}", "label": LABELS[n % len(LABELS)]} for n in range(100)
    ]
    path = write_csv(inside / "train.csv", rows)
    words = {key: value for key, value in base_flags.items() if key != "dataset_name"}
    words |= {**SHORT, "output_dir": inside / "run", "train_file": path}
    done = launch(FORK, flags(**words), drawn=True)
    assert done.returncode == 0, done.stderr
    scored = ["--model_name_or_path", str(inside / "run/best"), "--test_file", str(path)]
    again = launch(FORK, [*scored, "--output_dir", str(inside / "scored")], script="eval.py")
    assert again.returncode == 0, again.stderr
    for said in (done.stdout, done.stderr, again.stdout, again.stderr):
        assert not set("\x1b\x07\u202e") & set(said)
    assert set(os.listdir(inside)) == {"run", "scored", "train.csv"} and set(os.listdir(tmp_path)) == {"deep"}
    config = json.loads((inside / "run/best/config.json").read_text())
    assert set(config["id2label"].values()) == set(LABELS)
    card = (inside / "run/best/README.md").read_text()
    assert not set("\x1b\u202e") & set(card)
    block = card.split("```text\n")[1].split("\n```")[0].splitlines()
    assert len(block) == len(LABELS) and all(json.loads(line) for line in block)
    lines = [json.loads(line) for line in (inside / "scored/predictions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [row["text"] for row in rows]


@pytest.mark.case("an error about a text that holds control characters", "the message shows them escaped")
def test_a_message_escapes_what_it_quotes(base_flags, tmp_path):
    write_csv(tmp_path / "data/train.csv", make_rows(20))
    write_csv(tmp_path / "data/validation.csv", [{"text": "a film", "label": "\x1b[31mred\u202e"}])
    done = launch(FORK, flags(**{**base_flags, "dataset_name": tmp_path / "data"}))
    assert done.returncode == 2
    assert "\x1b" not in done.stderr and "\u202e" not in done.stderr and "[31mred" in done.stderr


@pytest.mark.case("an output_dir with spaces, quotes and Unicode", "trained, resumed and scored as any other")
def test_an_output_dir_with_spaces_and_unicode(base_flags, tmp_path):
    words = {**base_flags, "output_dir": tmp_path / 'läuf 1/ünï "q" 数', "max_train_steps": 4}
    assert train_here(**words) == 0
    assert train_here(**{**words, "max_train_steps": 6}, resume_from_checkpoint="latest") == 0
    model = words["output_dir"] / "best"
    scored = flags(model_name_or_path=model, dataset_name=base_flags["dataset_name"], output_dir=model.parent)
    done = launch(FORK, scored, script="eval.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.case("WANDB_API_KEY and HF_TOKEN in the environment", "in no file that the run leaves")
def test_no_secret_is_written(base_flags, tmp_path):
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "secret01", "HF_TOKEN": "hf_secretsecretsecret"}
    done = launch(ONE, flags(**base_flags, report_to="wandb,tensorboard"), WANDB_MODE="offline", **secrets)
    assert done.returncode == 0, done.stderr
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in left)
    for path in left:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets.values()), path


@pytest.mark.case("a data file that changes between stop and resume", "refused; both fingerprints are named")
def test_changed_data_is_refused(base_flags, reviews, tmp_path):
    shutil.copytree(reviews, tmp_path / "data")
    words = {**base_flags, "dataset_name": tmp_path / "data", "max_train_steps": 4}
    assert train_here(**words) == 0
    rows = list(csv.DictReader(open(tmp_path / "data/train.csv", newline="")))
    rows[7]["text"] += " indeed"
    write_csv(tmp_path / "data/train.csv", rows)
    with pytest.raises(UserError, match=r"another data: found .* Resume with the same files, tokenizer"):
        train_here(**{**words, "max_train_steps": 8}, resume_from_checkpoint="latest")


@pytest.mark.case("the clock set back by an hour in the middle", "the run works; its rates are positive")
def test_the_clock_may_be_set_back(base_flags, tmp_path, monkeypatch):
    clock, task_loss, updates = time.time, TextClassification.loss, []

    def loss(*args):
        updates.append(1)
        return task_loss(*args)

    monkeypatch.setattr(TextClassification, "loss", loss)
    monkeypatch.setattr(time, "time", lambda: clock() - 3600 * (len(updates) > 5))
    assert train_here(**base_flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["perf/examples_per_second"] > 0 for row in rows if "train/loss" in row)


KILL_WORKER = """
import itertools
from ft.data.loader import RowDataset
original, parent, calls = RowDataset.__getitems__, os.getpid(), itertools.count(1)
def deadly(self, slot):
    if os.getpid() != parent and next(calls) == 4:
        os.kill(os.getpid(), 9)
    return original(self, slot)
RowDataset.__getitems__ = deadly
"""


@pytest.mark.case(
    "a DataLoader's worker is killed", "the run ends within a minute with an error that says so"
)
def test_a_dead_worker_ends_the_run(base_flags, tmp_path):
    script = changed_train(tmp_path / "worker.py", KILL_WORKER)
    words = [*flags(**base_flags), "--dataloader_num_workers", "1"]
    done = launch(FORK, words, script=script, timeout=60)
    assert done.returncode == 1
    assert "worker" in done.stderr and "killed" in done.stderr
