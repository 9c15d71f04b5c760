"""train.py with the Hub that the environment names: `at_hub.py [flags of train.py]`. In a fork, the library
has already read its environment."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from huggingface_hub import constants

import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script

if __name__ == "__main__":
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
    constants.HF_HUB_DISABLE_XET = os.environ["HF_HUB_DISABLE_XET"] == "1"
    run_script(train.train, parse(Config))
