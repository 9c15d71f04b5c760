"""report.html, with rows that try to break it and made-up scores."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import flags
from prepared import jsonl
from transformers import AutoTokenizer

from ft.assess import assess
from ft.cli import parse
from ft.config import Config
from ft.data.prepare import prepare_data
from ft.data.sources import find_sources, fingerprints
from ft.evaluation import Evaluation, prefix_of
from ft.options import DataOptions
from ft.page import NOT_HTML, _source, breakable, number, said, write_page
from ft.report import progress_bar
from ft.tasks import build_task

SCRIPT, ITALIC = "<script>alert(1)</script>", "<i>x</i>"
ALL = {"summary", "curves", "slices", "errors", "data", "configuration", "repeat"}
SECTIONS = {
    "classes": ALL | {"labels", "confusion", "reliability", "coverage"},
    "two": ALL | {"labels", "confusion", "reliability", "coverage", "thresholds"},
    "labels": ALL | {"labels", "reliability", "coverage", "thresholds"},
    "numbers": ALL | {"predictions"},
}
LABELS = {
    "classes": lambda n: ["good", "bad", ITALIC][n % 3],
    "two": lambda n: ["good", ITALIC][n % 2],
    "labels": lambda n: [["good", ITALIC], [], [ITALIC]][n % 3],
    "numbers": lambda n: n / 7,
}


class Page(HTMLParser):
    """What a browser sees: the elements with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.text = path.read_text(encoding="utf-8"), [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def write(folder, tiny_model, label, rows=60, **more):
    """A page as at the end of a training run; returns it parsed."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = [{"text": f"{SCRIPT} \x00 $a$ {split} & {n}", "label": label(n)} for n in range(rows)]
        jsonl(folder / "data" / f"{split}.jsonl", lines)
    config = parse(
        Config,
        flags(
            model_name_or_path=tiny_model, dataset_name=folder / "data", output_dir=folder / "<b>run</b>",
            metric_for_best_model="loss", slice_columns="label", **more,
        ),
    )  # fmt: skip
    task = build_task(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = prepare_data(config, task, tokenizer, 64, lambda **options: progress_bar(False, **options))
    results = {
        "headline": list(task.headline), "train/total_steps": 4, "train/epochs": 1.0, "best/step": 2,
        "train/trainable_parameters": 99, "train/nonfinite_updates": 0, "train/loss_spikes": 0,
        "best/loss": 0.5, "perf/train_seconds": 1.5, "perf/examples_per_second": 40.0,
        "perf/tokens_per_second": 800.0,
    }  # fmt: skip
    scored = {}
    for seed, split in enumerate(("validation", "test")):
        labels = data.splits[split].labels
        width = len(task.label_names)
        scores = np.random.default_rng(seed).normal(size=(len(labels), width)).astype(np.float32)
        if split == "validation":
            task.calibration = task.calibrate(scores, labels)
        scored[split] = Evaluation({"rows": rows, "loss": 0.5, **task.metrics(scores, labels)}, scores)
        found = assess(task, data, split, scored[split])
        results |= {f"{prefix_of(split)}/{k}": v for k, v in found.items()}
    log = [{"step": n, "train/loss": 1 / n, "train/learning_rate": 1e-5} for n in (1, 2, 3, 4)]
    jsonl(folder / "metrics.jsonl", [*log, {"step": 4, "eval/loss": "NaN"}])
    import torch

    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"), mixed_precision="no")
    write_page(folder, config, task, data, results, scored, accelerator)
    return Page(folder / "report.html")


@pytest.mark.parametrize("kind", SECTIONS)
def test_each_kind_has_its_sections_and_all_that_the_data_holds_is_text(kind, tiny_model, tmp_path):
    page = write(tmp_path, tiny_model, LABELS[kind])
    tags = {tag for tag, _ in page.elements}
    assert [a["id"] for tag, a in page.elements if tag == "section"] == [
        name for name in [
            "summary", "curves", "labels", "confusion", "predictions", "reliability", "coverage",
            "thresholds", "slices", "errors", "data", "configuration", "repeat",
        ] if name in SECTIONS[kind]
    ]  # fmt: skip
    assert {link[1:] for link in page.all("href") if not link.startswith("#f")} == SECTIONS[kind]
    assert SCRIPT in page.text and "<b>run</b>" in page.text and "\x00" not in page.source
    assert (ITALIC in page.text) == (kind != "numbers")
    assert not tags & {"script", "i", "link", "iframe", "object", "embed", "base", "form"}
    assert "NaN" not in page.text and "None" not in page.text


def test_another_training_loss_is_said_below_the_curves(tiny_model, tmp_path):
    assert "not comparable" not in write(tmp_path / "plain", tiny_model, LABELS["two"]).text
    page = write(tmp_path / "focal", tiny_model, LABELS["two"], focal_gamma=2, class_weights="balanced")
    assert "train/loss is the training loss, with class_weights, focal_gamma; eval/loss is" in page.text


@pytest.mark.parametrize("kind", ["two", "numbers"])
def test_nothing_of_the_page_leads_out_of_it_and_its_ids_do_not_clash(kind, tiny_model, tmp_path):
    page = write(tmp_path, tiny_model, LABELS[kind])
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    links = [link for name in ("href", "src", "xlink:href", "srcset", "action") for link in page.all(name)]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    targets = {link[1:] for link in links if link.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert len(re.findall(r"url\(", page.source)) == len(re.findall(r"url\(#", page.source))
    assert "@import" not in page.source and "http:" not in page.source and "https:" not in page.source
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    ids = page.all("id")
    assert len(ids) == len(set(ids)) and targets <= set(ids)


def test_the_same_run_gives_the_same_bytes(tiny_model, tmp_path):
    first = write(tmp_path, tiny_model, LABELS["labels"], threshold_mode="per_label").source
    (tmp_path / "report.html").unlink()
    assert write(tmp_path, tiny_model, LABELS["labels"], threshold_mode="per_label").source == first


def test_many_classes_are_a_picture_and_the_most_frequent_of_them_a_table(tiny_model, tmp_path, monkeypatch):
    # Intervals take time, and are not checked here.
    monkeypatch.setattr("ft.assess.interval_numbers", lambda *rest: {})
    monkeypatch.setattr("ft.assess.slice_tables", lambda *rest: {"length_slices": []})
    page = write(tmp_path, tiny_model, lambda n: f"class {n % 130}", rows=200)
    assert "... and 30 more" in page.text
    assert any(link.startswith("data:image/png") for link in page.all("xlink:href"))
    assert "matrix" not in page.all("class")
    assert len(page.source) < 1_000_000


def test_a_slice_without_a_name_has_one(tiny_model, tmp_path, monkeypatch):
    rows = [{"value": value, "rows": 5} for value in ("", None, "north")]
    found = {"length_slices": [], "slices": {"shop": rows}}
    monkeypatch.setattr("ft.assess.slice_tables", lambda *rest: found)
    page = write(tmp_path, tiny_model, LABELS["two"])
    assert all(name in page.text for name in ("(empty)", "(none)", "north"))


def test_what_a_preflight_of_the_same_data_found_in_the_same_folder_is_there(tiny_model, tmp_path):
    (tmp_path / "<b>run<").mkdir()
    (tmp_path / "<b>run<" / "b>").mkdir()
    write(tmp_path, tiny_model, LABELS["numbers"])
    sources = fingerprints(find_sources(DataOptions(dataset_name=str(tmp_path / "data"))))
    found = {
        "findings": [
            {"level": "blocking", "topic": "output_dir", "message": "already holds a run"},  # of then
            {"level": "warning", "topic": "conflicts", "message": f"{ITALIC} is a copy"},
        ]
    }
    for read, is_there in ((sources, True), (sources | {"train": "mended"}, False)):
        (tmp_path / "<b>run<" / "b>" / "preflight.json").write_text(json.dumps(found | {"sources": read}))
        page = write(tmp_path, tiny_model, LABELS["numbers"])
        assert (f"warning: {ITALIC} is a copy" in page.text) == is_there
        assert "already holds a run" not in page.text


def test_what_html_may_hold_is_left():
    assert NOT_HTML.findall("a\r\n\t\f b\x00 c\x0b d\x7f") == ["\x00", "\x0b", "\x7f"]


def test_the_source_is_that_of_the_rows():
    config = Config(dataset_name="all", test_file="new.csv")
    assert (_source(config, "test"), _source(config, "validation")) == ("new.csv", "all")
    assert _source(Config(train_file="t.csv"), "validation") == "t.csv"  # set aside


def test_numbers_are_for_people():
    shown = [number(v) for v in (0.123456, 1.0, 0, 12345, 12345.6, 5e-05, None, float("nan"), -0.5)]
    assert shown == ["0.1235", "1.000", "0", "12,345", "12,346", "5.000e-05", "–", "–", "-0.5000"]
    assert [number(v) for v in (999.94, 999.96, -999.96)] == ["999.9", "1,000", "-1,000"]  # and not "1000."
    assert [said(v) for v in (1998.6, 234567.5, 1700000123.4, "a", ["a", "b"], [])] == [
        "1998.6", "234567.5", "1700000123", "a", "a, b", "no label",
    ]  # fmt: skip
    assert breakable("<a_b") == "&lt;a_<wbr>b"
