"""train.py on a `Run` that counts collectives: `counted.py [apart] WORDS ...` also writes OUTPUT_DIR.json."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from apart import share_no_memory

import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script

COLLECTIVES = (
    "all_reduce broadcast all_gather all_gather_into_tensor reduce gather barrier scatter reduce_scatter "
    "reduce_scatter_tensor all_to_all all_to_all_single send recv isend irecv all_gather_object "
    "broadcast_object_list gather_object scatter_object_list"
).split()


def counted_run(config: Config) -> int:
    """The run; notes the update of each gradient bucket that DDP exchanges, and of each other collective."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from ft.run import Run

    found = {"rounds": [], "others": []}

    class Counting(Run):
        def start(self, *args):
            progress, ddp = super().start(*args), self.model
            found.update(
                view=ddp.gradient_as_bucket_view, unused=ddp.find_unused_parameters,
                buffers=ddp.broadcast_buffers, updates=self.total,
                table=ddp.module.get_input_embeddings().weight.shape,
                trained=sum(weight.numel() for weight in ddp.parameters() if weight.requires_grad),
            )  # fmt: skip

            def hook(group, bucket):
                size, before = bucket.buffer().numel(), len(found["others"])
                exchanged = allreduce_hook(group, bucket)
                del found["others"][before:]  # its own
                found["rounds"].append([progress.step, bucket.index(), bucket.is_last(), size])
                return exchanged

            ddp.register_comm_hook(None, hook)
            for name in COLLECTIVES:
                self.note(name, getattr(torch.distributed, name))
            return progress

        def note(self, name, function):
            def noted(tensor=None, *args, **kwargs):
                size = tensor.numel() if isinstance(tensor, torch.Tensor) else 0
                found["others"].append([self.progress.step, name, size])
                return function(tensor, *args, **kwargs)

            setattr(torch.distributed, name, noted)

    code = train.train(config, Counting)
    if os.environ["RANK"] == "0":
        Path(f"{config.output_dir}.json").write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    if sys.argv[1] == "apart":
        del sys.argv[1]
        share_no_memory()
    run_script(counted_run, parse(Config, sys.argv[1:]))
