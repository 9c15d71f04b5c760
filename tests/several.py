"""Runs several scripts in one launch, one after the other: `several.py RUNS.json`, which lists pairs of a
script (train or eval) and its arguments."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval as evaluation
import train
from ft.cli import parse
from ft.config import Config, EvalConfig
from ft.errors import EXIT_DONE
from ft.runtime import run_script

SCRIPTS = {"train": (train.train, Config), "eval": (evaluation.score, EvalConfig)}


def run(first: Config) -> int:
    """The first run, whose config is given, and the others."""
    for script, words in json.loads(Path(sys.argv[1]).read_text()):
        function, options = SCRIPTS[script]
        assert function(parse(options, words)) == EXIT_DONE
    return EXIT_DONE


if __name__ == "__main__":
    script, words = json.loads(Path(sys.argv[1]).read_text())[0]
    run_script(run, parse(SCRIPTS[script][1], words))
