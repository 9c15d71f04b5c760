"""Every recipe parses; those of the Hub run end to end against a stand-in for it on 127.0.0.1.

The libraries' own clients talk to the stand-in (HF_ENDPOINT), so loading by Hub id is the real code."""

import hashlib
import json
import runpy
import socket
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ONE, ROOT, flags, launch, make_rows, series
from stand_in import StandIn

from ft.cli import parse
from ft.config import Config
from ft.data.sources import local_path
from ft.pretrained import find_model

RECIPES = ROOT / "ft" / "recipes"
TESTED = {
    "quickstart": "parsed",
    "yelp": "run",
    "yelp_small": "run",
    "glue": "run",
}  # the quickstart needs its packages
MODEL, DATA = "google-bert/bert-base-cased", "Yelp/yelp_review_full"
STARS = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
ROWS = {"train": 1300, "test": 1100}
GLUE, PAIRS = "nyu-mll/glue", {"train": 640, "validation": 60, "test": 50}


def test_each_recipe_is_tested_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == TESTED.keys()


@pytest.mark.parametrize("name", TESTED)
def test_a_recipe_parses_and_opens_with_its_command(name):
    from ft.cli import parse
    from ft.config import Config

    config = parse(Config, [str(RECIPES / f"{name}.yaml")])
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert {key: getattr(config, key) for key in given} == given
    assert config.output_dir == f"output/{name}"
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ") and "accelerate launch" in text.split("model_name_or_path")[0]


def test_a_recipe_of_the_package_is_found_where_the_package_is_installed():
    from importlib.resources import files

    assert {path.name for path in files("ft.recipes").iterdir() if path.name.endswith(".yaml")} == {
        f"{name}.yaml" for name in TESTED
    }


def test_yelp_small_is_the_tutorials_job():
    recipe = yaml.safe_load((RECIPES / "yelp_small.yaml").read_text())
    tutorial = {
        "model_name_or_path": MODEL, "dataset_name": DATA, "max_train_samples": 1000,
        "max_predict_samples": 1000, "global_batch_size": 8, "num_train_epochs": 3, "learning_rate": 5e-5,
        "lr_scheduler_type": "linear", "weight_decay": 0.01, "max_grad_norm": 0, "seed": 42,
    }  # fmt: skip
    assert {key: recipe.get(key) for key in tutorial} == tutorial
    import torch

    assert torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).defaults["weight_decay"] == 0.01


def test_without_arguments_train_py_runs_the_quickstart(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr("ft.runtime.run_script", lambda main, config: seen.append(config))
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert seen == [parse(Config, [str(RECIPES / "quickstart.yaml")])]
    # From packages that are installed for these tests.
    assert (Path(find_model(seen[0].model_name_or_path)) / "config.json").is_file()
    assert local_path(seen[0].dataset_name).is_dir()


# --- a stand-in for the Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(StandIn):
    """Serves folders as repositories ("models/ORG/NAME", "datasets/ORG/NAME"): lists of files, and files."""

    def __init__(self, repositories):
        self.repositories = repositories
        super().__init__()

    def respond(self, method, path, headers, body):
        status, more, content = self.found(urllib.parse.unquote(path.partition("?")[0]))
        return status, {"X-Repo-Commit": COMMIT, **more}, content

    def found(self, path):
        """Status, headers and content for a path."""
        for name, folder in self.repositories.items():
            files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
            resolve = f"/{name.removeprefix('models/')}/resolve/"
            if path == f"/api/{name}" or path.startswith(f"/api/{name}/revision/"):
                identity = name.partition("/")[2]
                siblings = [{"rfilename": file} for file in files]
                return self.as_json({"id": identity, "sha": COMMIT, "siblings": siblings, "tags": []})
            if path.startswith(f"/api/{name}/tree/"):
                below = path.removeprefix(f"/api/{name}/tree/").partition("/")[2]
                folders = [{"type": "directory", "path": str(p.relative_to(folder)), "oid": COMMIT, "size": 0}
                           for p in folder.rglob("*") if p.is_dir()]  # fmt: skip
                entries = [*folders, *(self.entry(file, place) for file, place in files.items())]
                return self.as_json([entry for entry in entries if entry["path"].startswith(below)])
            if path.startswith(resolve):
                file = path.removeprefix(resolve).partition("/")[2]
                if file not in files:
                    return 404, {"X-Error-Code": "EntryNotFound"}, b""
                content = files[file].read_bytes()
                return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    @staticmethod
    def as_json(value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @staticmethod
    def entry(file, path):
        content = path.read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": oid}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, tiny_model):
    """A small random BERT with 512 positions, and reviews laid out like the real data set."""
    from datasets import ClassLabel, Dataset, Features, Value
    from transformers import AutoTokenizer, BertConfig, BertModel

    root = tmp_path_factory.mktemp("hub")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(root / "model")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(root / "model")
    features = Features({"label": ClassLabel(names=STARS), "text": Value("string")})
    for seed, (split, count) in enumerate(ROWS.items()):
        # A number in each text distinguishes the rows.
        rows = [
            {"label": i % 5, "text": f"{row['text']} {i}"} for i, row in enumerate(make_rows(count, seed))
        ]
        file = root / "data" / "yelp_review_full" / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(file)
    splits = [{"split": split, "path": f"yelp_review_full/{split}-*"} for split in ROWS]
    card = {"configs": [{"config_name": "yelp_review_full", "default": True, "data_files": splits}]}
    (root / "data" / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# Reviews\n")
    features = Features(
        {
            "sentence1": Value("string"), "sentence2": Value("string"),
            "label": ClassLabel(names=["not_equivalent", "equivalent"]), "idx": Value("int32"),
        }
    )  # fmt: skip
    for seed, (split, count) in enumerate(PAIRS.items()):
        texts = [row["text"] for row in make_rows(count + 1, seed)]
        rows = [
            {"sentence1": texts[i], "sentence2": texts[i + i % 2], "label": 1 - i % 2, "idx": i}
            for i in range(count)
        ]
        Dataset.from_list(rows, features=features).to_parquet(
            root / f"glue/mrpc/{split}-00000-of-00001.parquet"
        )
    entailed = Features(
        {
            "premise": Value("string"), "hypothesis": Value("string"), "idx": Value("int32"),
            "label": ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )  # fmt: skip
    mnli = {"train": 640, "validation_matched": 60, "validation_mismatched": 9, "test_matched": 50}
    for seed, (split, count) in enumerate(mnli.items()):
        texts = [row["text"] for row in make_rows(count + 1, seed)]
        rows = [
            {
                "premise": texts[i],
                "hypothesis": texts[i + 1],
                "label": -1 if "test" in split else i % 3,
                "idx": i,
            }
            for i in range(count)
        ]
        Dataset.from_list(rows, features=entailed).to_parquet(
            root / f"glue/mnli/{split}-00000-of-00001.parquet"
        )
    card = {
        "configs": [
            {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in of_task]}
            for name, of_task in {"mrpc": PAIRS, "mnli": mnli}.items()
        ]
    }
    (root / "glue" / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# Pairs\n")
    folders = {f"models/{MODEL}": "model", f"datasets/{DATA}": "data", f"datasets/{GLUE}": "glue"}
    return {name: root / folder for name, folder in folders.items()}


@pytest.fixture
def hub(repositories):
    stand_in = Hub(repositories)
    yield stand_in
    stand_in.close()


def run_recipe(name, hub, tmp_path, offline="0", **more):
    """A recipe, launched with nothing changed except the output folder and `more`."""
    words = [str(RECIPES / f"{name}.yaml"), *flags(**{"output_dir": tmp_path / name, **more})]
    surroundings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": offline}
    return launch(ONE, words, **surroundings)


def encoded_rows(tmp_path):
    """The source's row numbers of each split, in order, from the encoding cache."""
    from ft.data.encode import EncodedRows

    (folder,) = [path.parent for path in (tmp_path / "hf/ft-encoded").glob("*/data.json")]
    return {path.stem: EncodedRows.open(path).row for path in folder.glob("*.arrow")}


def test_glue_runs_on_pairs_of_one_configuration(hub, tmp_path):
    done = run_recipe("glue", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "glue/results.json").read_text())
    assert results["train/total_steps"] == 3 * 40 and np.sum(results["test/confusion_matrix"]) == 50
    (line, *_) = (tmp_path / "glue/metrics.jsonl").read_text().splitlines()
    names = list(json.loads((tmp_path / "glue/best/config.json").read_text())["id2label"].values())
    assert (
        names == ["not_equivalent", "equivalent"]
        and json.loads(line)["data/rows"] == 16 * json.loads(line)["step"]
    )
    columns = json.loads((tmp_path / "glue/environment.json").read_text())["columns"]
    assert columns["texts"] == ["sentence1", "sentence2"] and columns["label"] == "label"


def test_another_task_of_glue_whose_test_labels_are_kept_back(hub, tmp_path):
    """As in the recipe's comment."""
    task = {
        "dataset_config_name": "mnli", "text_column_names": "premise,hypothesis",
        "validation_split_name": "validation_matched", "test_split_name": "test_matched",
    }  # fmt: skip
    done = run_recipe("glue", hub, tmp_path, **task)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "glue/results.json").read_text())
    assert np.sum(results["eval/confusion_matrix"]) == 60 and "test/accuracy" not in results
    surroundings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    more = {"model_name_or_path": tmp_path / "glue/best", "output_dir": tmp_path / "out", "split": "test"}
    words = [str(RECIPES / "glue.yaml"), *flags(**task, **more)]
    done = launch(ONE, words, script="eval.py", **surroundings)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == 50


def test_yelp_small_runs_on_the_tutorials_rows_and_again_without_the_hub(hub, repositories, tmp_path):
    done = run_recipe("yelp_small", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "yelp_small"
    results = json.loads((output / "results.json").read_text())
    assert results["train/total_steps"] == 375 and np.sum(results["test/confusion_matrix"]) == 1000
    assert not [key for key in results if key.startswith("eval/")]
    assert list(json.loads((output / "best/config.json").read_text())["id2label"].values()) == STARS
    rates = series(output, "train/learning_rate")
    assert rates[10] == pytest.approx(5e-5 * (375 - 9) / 375) and rates[370] == pytest.approx(5e-5 * 6 / 375)

    from datasets import Dataset

    rows = encoded_rows(tmp_path)
    assert rows.keys() == {"train", "test"}
    for split, count in ROWS.items():
        numbered = Dataset.from_dict({"row": range(count)})
        wanted = numbered.shuffle(seed=42).select(range(1000))["row"]  # as the tutorial draws them
        assert sorted(rows[split].tolist()) == sorted(wanted)

    # The Hub was asked for these two and nothing else.
    got = [request for request in hub.requests if request.startswith("GET")]
    assert any(f"/{MODEL}/resolve/" in request and "model.safetensors" in request for request in got)
    assert any(f"/datasets/{DATA}/resolve/" in request and "train-00000" in request for request in got)
    assert all(MODEL in request or DATA in request for request in hub.requests), "telemetry, or what?"

    # Once fetched, they work without a network.
    asked = len(hub.requests)
    again = run_recipe("yelp_small", hub, tmp_path, offline="1", output_dir=tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert len(hub.requests) == asked
    assert series(tmp_path / "again", "train/loss") == series(output, "train/loss")


def test_yelp_runs_end_to_end(hub, tmp_path):
    done = run_recipe("yelp", hub, tmp_path, max_train_steps=4, eval_steps=2, save_steps=2, logging_steps=1)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "yelp/results.json").read_text())
    assert np.sum(results["eval/confusion_matrix"]) == 26  # 2 percent, set aside from training
    assert np.sum(results["test/confusion_matrix"]) == 1100 and results["train/total_steps"] == 4
    assert sorted(series(tmp_path / "yelp", "eval/accuracy")) == [2, 4]
    rows = encoded_rows(tmp_path)
    assert len(rows["train"]) == 1274 and not set(rows["train"]) & set(rows["validation"])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "model_name_or_path",
            "no-one/no-model",
            "model_name_or_path: 'no-one/no-model' is no folder here, and cannot be loaded",
        ),
        ("dataset_name", "no-one/no-data", "dataset_name: 'no-one/no-data' is no local folder"),
    ],
)
def test_what_the_hub_does_not_have_is_one_clear_message(hub, tmp_path, flag, value, message):
    done = run_recipe("yelp_small", hub, tmp_path, **{flag: value})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_network_is_one_clear_message(repositories, tmp_path):
    with socket.socket() as silent:  # it does not listen; no other test's server can bind its port
        silent.bind(("127.0.0.1", 0))
        gone = SimpleNamespace(url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        done = run_recipe("yelp_small", gone, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert MODEL in said  # before it, the hub's client reports its retries
    assert not Path(tmp_path / "yelp_small").exists()
