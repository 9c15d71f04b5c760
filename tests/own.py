"""train.py with different flags for each process, as on several hosts: `own.py OWN.json [flags of train.py]`.
OWN.json lists those of each rank."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script

if __name__ == "__main__":
    own = json.loads(Path(sys.argv.pop(1)).read_text())
    sys.argv += own[int(os.environ["RANK"])]
    run_script(train.train, parse(Config))
