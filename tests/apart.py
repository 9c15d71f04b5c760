"""train.py with processes that share no memory, as those of several hosts: `apart.py [flags of train.py]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script


def share_no_memory() -> None:
    """Leave the gradient exchange to DDP and gloo. Real hosts detect this by themselves."""
    import ft.ddp

    ft.ddp.shared_memory = lambda rows, numbers, hosts: None


if __name__ == "__main__":
    share_no_memory()
    run_script(train.train, parse(Config))
