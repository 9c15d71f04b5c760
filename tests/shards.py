"""A training run that records in its output folder how much of the model each process has held:
`shards.py [flags of train.py]`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from ft.cli import parse
from ft.config import Config
from ft.run import Run
from ft.runtime import run_script
from ft.sharded import shard


class Weighed(Run):
    """Counts, at the end, the weights and AdamW's moments, and the modules that are sharded by
    themselves."""

    def close(self, summary, *shown):
        from torch.distributed.fsdp import FSDPModule

        weights = list(self.model.parameters())
        states = self.optimizer.state.values()
        held = {
            "of the model": sum(weight.numel() for weight in weights),
            "weights": sum(shard(weight).numel() for weight in weights),
            "moments": sum(shard(state["exp_avg"]).numel() for state in states),
            "cut": [name for name, module in self.model.named_modules() if isinstance(module, FSDPModule)],
        }
        (self.output_dir / f"held-{self.accelerator.process_index}.json").write_text(json.dumps(held))
        super().close(summary, *shown)


if __name__ == "__main__":
    run_script(lambda config: train.train(config, Weighed), parse(Config))
