"""What the README says to type can be typed."""

import re
import shlex
from dataclasses import fields

import pytest
from conftest import ROOT

from ft.cli import parse
from ft.config import Config, EvalConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": Config, "slurm/train.sbatch": Config, "eval.py": EvalConfig}
# Flags of launchers, of Slurm, W&B, TensorBoard and the benchmarks, and those that are no option of a config.
OF_OTHERS = (
    "config_file num_processes mixed_precision max_restarts quiet nproc_per_node time nodes gpus cpus export "
    "count logdir data help print_config"
).split()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    """Those that start a script: the words before it, its name, and the words behind it."""
    for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for place in [place for place, word in enumerate(words) if word in SCRIPTS]:
            yield words[:place], words[place], words[place + 1 :]


COMMANDS = list(commands())


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """The files that it names: my.yaml, which it shows, the config of a run, and those of the clone."""
    (mine,) = blocks("yaml")
    for name in ("my.yaml", "output/quickstart/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(mine, encoding="utf-8")
    for name in ("ft", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "before, script, words", COMMANDS, ids=[f"{script} {' '.join(words)}" for _, script, words in COMMANDS]
)
def test_a_command_is_understood(before, script, words, beside, capsys):
    from accelerate.commands.launch import launch_command_parser

    if "launch" in before:
        options = launch_command_parser().parse_args([*before[before.index("launch") + 1 :], script])
        assert options.training_script == script
        assert options.config_file is None or (beside / options.config_file).is_file()
    defaults = str(beside / "ft/recipes/quickstart.yaml") if script == "train.py" else None
    try:
        parse(SCRIPTS[script], words, defaults)
    except SystemExit as end:  # after --print_config, or a mistake
        assert end.code == 0, capsys.readouterr().err


def test_all_flags_are_known():
    named = set(re.findall("--([a-z][a-z0-9_]*)", README))
    assert len(COMMANDS) > 20 and len(named) > 40
    assert named - {field.name for field in fields(EvalConfig)} <= set(OF_OTHERS)
