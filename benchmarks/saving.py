"""Seconds for which a checkpoint pauses training, against a save that waits for the disk."""

import argparse
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.common import at_least, device, gemm_peak, in_turn, median, save, say, spread, table

QUICK = {"rounds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument(
        "--folder", type=_folder, help="where to write; default: the system's temporary folder"
    )


def _folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} is no folder")
    return Path(name)


def run(options: argparse.Namespace) -> None:
    """A save that waits, Accelerate's, and one in the background in turn, round by round, after one that does
    not count."""
    import torch
    from accelerate import Accelerator
    from transformers import BertConfig, BertModel

    from ft.checkpoint import Progress, snapshot, write_checkpoint
    from ft.config import Config
    from ft.optim import build_scheduler
    from ft.writer import BackgroundWriter

    accelerator = Accelerator(cpu=device().type == "cpu")
    network = BertModel(BertConfig(vocab_size=18_000))
    parameters = sum(p.numel() for p in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-9, fused=True)
    scheduler = build_scheduler(optimizer, Config(), 10**6)
    network, optimizer, scheduler = accelerator.prepare(network, optimizer, scheduler)

    def update() -> float:
        begin = time.perf_counter()
        ids = torch.ones((8, 32), dtype=torch.int64, device=accelerator.device)
        accelerator.backward(network(input_ids=ids).last_hidden_state.pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - begin

    writer, measured, gemm, steps = BackgroundWriter(), [], [gemm_peak()], count(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:

        def write(state: Any) -> None:
            write_checkpoint(Path(folder), state, asdict(Progress(step=next(steps))), {}, 10**6, 1)

        def waiting() -> dict[str, float]:
            update()
            begin = time.perf_counter()
            write(snapshot(accelerator, network, optimizer, scheduler))
            return {"blocking": time.perf_counter() - begin}

        def accelerates() -> dict[str, float]:
            update()
            begin = time.perf_counter()
            accelerator.save_state(str(Path(folder) / "state"))
            seconds = time.perf_counter() - begin
            shutil.rmtree(Path(folder) / "state")
            return {"save_state": seconds}

        def in_background() -> dict[str, float]:
            alone = [update() for _ in range(5)]
            begin = time.perf_counter()
            state = snapshot(accelerator, network, optimizer, scheduler)
            writer.submit("the checkpoint", lambda state=state: write(state))
            del state
            stall = time.perf_counter() - begin
            beside, begin = [], time.perf_counter()
            while writer.busy:
                beside.append(update())
            written = time.perf_counter() - begin
            writer.wait()
            alone += [update() for _ in range(5)]
            lost = stall + written - len(beside) * median(alone)
            times = {"update": median(alone), "beside": median(beside), "write": written}
            return {"stall": stall, "lost": lost, **times}

        for number in range(options.rounds + 1):
            found: dict[str, float] = {}
            for measure in in_turn([waiting, accelerates, in_background], number):
                found |= measure()
            if number:
                measured.append(found)
                say(str(found))
                gemm.append(gemm_peak())
                found = {"rounds": measured, "parameters": parameters}
                save(options, _text(measured, parameters), found, gemm)


def _text(measured: list[dict[str, float]], parameters: int) -> str:
    names = {
        "blocking": "save that waits for the disk",
        "save_state": "Accelerate's save_state, which neither hashes nor waits for the disk",
        "stall": "save in the background: the loop stops for",
        "update": "an update, nothing being written",
        "beside": "an update beside the write",
        "write": "the write in the background, from begin to end",
        "lost": "save in the background, in all: the stall, and what the updates beside it take longer",
    }
    rows = []
    for key, name in names.items():
        values = [one[key] for one in measured]
        rows.append([name, f"{median(values):.2f}", spread(values, 2)])
    stall, lost = (median([one[key] / one["blocking"] for one in measured]) for key in ("stall", "lost"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return (
        f"{table(['seconds', 'median', 'lowest to highest'], rows)}\n\nThe stall is {stall:.2f} of the "
        f"blocking save, all that is lost {lost:.2f} (medians over {len(measured)} rounds). "
        f"{parameters / 1e6:.0f} million parameters with AdamW's two moments, hashed and flushed to the "
        f"disk. The process held {peak:,.0f} MB at most."
    )
