"""The house: imports go down only, and some things are known in one file only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Each file may import what stands in an earlier row, and nothing of its own row.
LEVELS = [
    ["ft", "ft.errors", "ft.data", "ft.recipes"],
    ["ft.config"],
    ["ft.cli", "ft.data.files", "ft.data.plan", "ft.data.split", "ft.dropout", "ft.metrics"],
    ["ft.data.audit", "ft.data.sources", "ft.optim", "ft.checkpoint", "ft.tracking"],
    ["ft.data.encode", "ft.output", "ft.runtime"],
    ["ft.data.loader"],
    ["ft.tasks.base"],
    ["ft.tasks.text_classification"],
    ["ft.tasks"],
    ["ft.data.prepare", "ft.evaluation", "ft.model", "ft.report"],
    ["ft.run"],
    ["train", "eval"],
]
LEVEL = {name: number for number, row in enumerate(LEVELS) for name in row}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in [*ROOT.glob("ft/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]}


def imports_of(path):
    """Modules that a file imports anywhere, except for the types alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in inner)


def test_the_list_of_files_is_complete():
    assert len(FILES) > 20 and set(FILES) == set(LEVEL)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down_only(name):
    for imported in imports_of(FILES[name]):
        if imported in LEVEL:
            assert LEVEL[imported] < LEVEL[name], f"{name} imports {imported}"


def importers(module):
    return {name for name, path in FILES.items() if any(i.split(".")[0] == module for i in imports_of(path))}


def test_one_file_knows_the_parser():
    assert importers("jsonargparse") == {"ft.cli"}


def test_one_file_builds_the_accelerator():
    assert {name for name, path in FILES.items() if "Accelerator(" in path.read_text()} == {"ft.runtime"}


def test_a_task_knows_neither_the_config_nor_another_task_and_the_loop_names_none():
    tasks = {name for name in FILES if name.startswith("ft.tasks.")} - {"ft.tasks.base"}
    assert tasks
    for name in tasks:
        assert not ({"ft.config"} | tasks) & set(imports_of(FILES[name]))
    assert "classification" not in (ROOT / "train.py").read_text()


def test_the_loop_stands_on_two_screens():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 130
