"""train.py on a `Run` that counts what is alive at two updates: `weighed.py EARLY LATE WORDS ...` also writes
OUTPUT_DIR.json: the number of tensors, their bytes, the bytes of Python and NumPy, and the number of all
objects at each."""

import gc
import json
import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script

AT = [int(word) for word in sys.argv[1:3]]


def weighed_run(config: Config) -> int:
    """The run."""
    import torch

    from ft.run import Run

    alive = []
    tracemalloc.start()

    class Weighed(Run):
        def count(self, *args):
            super().count(*args)
            if self.progress.step in AT:
                self.saver.wait()  # holds a copy of what it writes
                gc.collect()
                objects = gc.get_objects()
                tensors = [one for one in objects if type(one) is torch.Tensor]
                of_python, _ = tracemalloc.get_traced_memory()
                alive.append([len(tensors), sum(one.nbytes for one in tensors), of_python, len(objects)])
                del objects, tensors

    code = train.train(config, Weighed)
    Path(f"{config.output_dir}.json").write_text(json.dumps(alive))
    return code


if __name__ == "__main__":
    run_script(weighed_run, parse(Config, sys.argv[3:]))
