"""The architecture: imports go only downwards, and some things are known in only one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. A file imports only from lower floors, and nothing from its own.
FLOORS = [
    floor.split()
    for floor in (
        "ft ft.errors ft.analysis ft.analysis.resampling ft.analysis.targets",
        "ft.values ft.durable ft.layers ft.sharded ft.launch ft.hosts",
        "ft.tasks.base ft.data ft.data.pieces ft.data.plan ft.data.split ft.data.tables ft.options "
        "ft.dropout ft.ema ft.health ft.signals ft.rendezvous ft.throughput ft.watchdog ft.writer ft.trial "
        "ft.shared_gradients ft.heap ft.recipes ft.best ft.analysis.statistics ft.analysis.calibration "
        "ft.analysis.curves ft.analysis.errors ft.page.plots ft.preflight.findings ft.preflight.memory "
        "ft.preflight.rows ft.tasks.text_classification.label_names",
        "ft.attention ft.config ft.data.encoder ft.data.files ft.metrics ft.train_loss ft.checkpoint "
        "ft.analysis.intervals ft.analysis.ranks ft.preflight.costs ft.preflight.duplicates "
        "ft.preflight.labels ft.preflight.lengths",
        "ft.wandb_run ft.data.class_folders ft.data.columns ft.data.workers ft.last_layer",
        "ft.lora ft.cli ft.data.audit ft.data.hub ft.optim ft.tracking ft.output "
        "ft.analysis.predictions ft.preflight.near ft.fsdp",
        "ft.data.encode ft.data.sources ft.runtime ft.scored ft.prediction_files "
        "ft.tasks.text_classification.kind "
        "ft.tasks.text_classification.labels ft.tasks.text_classification.losses "
        "ft.tasks.text_classification.thresholds ft.tasks.text_classification.weights "
        "ft.analysis.comparison ft.analysis.label_errors ft.analysis.summary",
        "ft.tasks.text_classification.multi_label ft.tasks.text_classification.regression "
        "ft.tasks.text_classification.single_label ft.data.usable ft.pretrained ft.words",
        "ft.tasks.text_classification",
        "ft.data.loader ft.data.prepare ft.tasks ft.attempts",
        "ft.evaluation ft.evaluation_place ft.model ft.report ft.data.slices ft.unseen",
        "ft.resume ft.saver ft.assess ft.dashboard ft.predict ft.page.audit ft.card ft.push",
        "ft.page",
        "ft.finish",
        "ft.run ft.verify ft.invariance ft.seeds ft.compare",
        "ft.ddp ft.preflight.reading ft.preflight.floors ft.preflight.probe",
        "ft.preflight.audit ft.preflight.forecast",
        "ft.preflight.screen",
        "ft.preflight",
        "train eval",
    )
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
LIGHT = ["ft.errors", "ft.config", "ft.cli", "ft.runtime", "ft.tasks.base", "ft.tracking"]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in [*ROOT.glob("ft/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(tree):
    """Modules that a file imports, also inside functions, except those needed only for types."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read by this test; write them out"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(FILES)) | ({node.module} if not inner <= set(FILES) else set())
    return found


def importers(package):
    return {name for name, tree in TREES.items() if package in {i.split(".")[0] for i in imports_of(tree)}}


def test_each_file_has_a_floor():
    assert FILES.keys() == FLOOR.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR), "a file stands on two floors"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down_only(name):
    ours = {
        imported for imported in imports_of(TREES[name]) if imported.split(".")[0] in ("ft", "train", "eval")
    }
    assert ours <= FLOOR.keys()
    wrong = {imported for imported in ours if FLOOR[imported] >= FLOOR[name]}
    assert not wrong, f"{name} (floor {FLOOR[name]}) imports {wrong}"


def test_this_test_sees_imports_inside_functions_and_not_those_for_types():
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ft.run\n"
        "def f():\n    from ft import checkpoint\n    from ft.config import Config\n    import ft.model\n"
    )
    assert imports_of(ast.parse(source)) == {"typing", "ft.checkpoint", "ft.config", "ft.model"}


def test_one_file_knows_the_parser():
    assert importers("jsonargparse") == {"ft.cli"}


def test_one_file_builds_the_accelerator():
    builders = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Accelerator"
    }
    assert builders == {"ft.runtime"}


def test_one_file_knows_each_tracker():
    assert importers("wandb") == {"ft.wandb_run"}
    assert importers("trackio") | importers("tensorboard") <= {"ft.tracking"}


def test_no_file_reads_the_clock_that_may_be_set_back():
    """Durations are measured by `time.monotonic` and `time.perf_counter`, which only go forward."""
    for name, tree in TREES.items():
        nodes = list(ast.walk(tree))
        read = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        sources = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not read & {"time.time", "time.time_ns"} and "time" not in sources, name


def concrete_tasks():
    """The files of each task, a module or a package."""
    tasks = {}
    for name in FILES:
        if name.startswith("ft.tasks.") and name != "ft.tasks.base":
            tasks.setdefault(".".join(name.split(".")[:3]), set()).add(name)
    return tasks


KINDS = {f"ft.tasks.text_classification.{kind}" for kind in ("single_label", "multi_label", "regression")}


def test_a_task_knows_neither_the_config_nor_another_task():
    tasks = concrete_tasks()
    assert tasks
    for task, files in tasks.items():
        others = set().union(*(tasks[other] for other in tasks if other != task))
        for name in files:
            assert not ({"ft.options", "ft.config", "ft.cli", "ft.tasks"} | others) & imports_of(
                TREES[name]
            ), name


def test_a_kind_of_text_classification_knows_no_other():
    assert KINDS < FILES.keys()
    for name in KINDS:
        assert not (KINDS | {"ft.tasks.text_classification"}) & imports_of(TREES[name]), name
    assert KINDS < imports_of(TREES["ft.tasks.text_classification"])


def test_the_loop_and_the_evaluation_name_no_task():
    names = {name.rpartition(".")[2] for name in [*concrete_tasks(), *KINDS]}
    words = names | {name.title().replace("_", "") for name in names} | {"classification", "label_names"}
    for script in ("train", "eval", "ft.run", "ft.evaluation"):
        text = FILES[script].read_text(encoding="utf-8")
        assert not [word for word in words if word in text], script


def test_the_parser_answers_before_anything_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'accelerate', 'datasets', 'evaluate', 'pandas', 'sklearn', 'wandb'}"
    script = f"import sys, {', '.join(LIGHT)}\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_loop_stands_on_two_screens():
    assert len(FILES["train"].read_text(encoding="utf-8").splitlines()) <= 130
