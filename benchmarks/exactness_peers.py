"""The other ways to train, with their losses, gradient norms and weights:
`python -m benchmarks.exactness_peers NAME JSON`, on one process or under torchrun on several."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from benchmarks.peers import load_model, load_rows, load_tokenizer

Step = dict[str, float]


def prepare(
    model: str, train: str, max_length: int, no_dropout: list[str], seed: int
) -> tuple[Any, Any, Dataset]:
    """Network, tokenizer and encoded rows, after setting the seed."""
    config, tokenizer = load_tokenizer(model)
    names: list[str] = []
    rows = load_rows(train, tokenizer, names, max_length)
    for name in no_dropout:
        setattr(config, name, 0.0)
    set_seed(seed)
    return load_model(model, config, len(names)), tokenizer, rows


def save_weights(network: Any, folder: str) -> None:
    """Write the weights where train.py writes its own."""
    place = Path(folder) / "final"
    place.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), place / "model.safetensors")


class StopAt(TrainerCallback):
    """Ends the training after some updates, like a crash after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def trainer(
    model: str, train: str, max_length: int, micro: int, accumulation: int, updates: int, seed: int,
    learning_rate: float, no_dropout: list[str], out: str, stop_at: int | None, resume: bool,
) -> list[Step]:  # fmt: skip
    """transformers.Trainer at its defaults."""
    network, tokenizer, rows = prepare(model, train, max_length, no_dropout, seed)
    run = Trainer(
        network,
        TrainingArguments(
            output_dir=out, use_cpu=True, per_device_train_batch_size=micro, max_steps=updates, seed=seed,
            gradient_accumulation_steps=accumulation, learning_rate=learning_rate, logging_steps=1,
            save_strategy="steps", save_steps=stop_at or updates, report_to="none", disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[StopAt(stop_at)] if stop_at else [],
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    if run.is_world_process_zero():
        save_weights(run.accelerator.unwrap_model(run.model), out)
    logs = [row for row in run.state.log_history if "loss" in row]
    return [{"step": row["step"], "loss": row["loss"], "grad_norm": row["grad_norm"]} for row in logs]


def plain(
    model: str, train: str, max_length: int, micro: int, accumulation: int, updates: int, seed: int,
    learning_rate: float, no_dropout: list[str], out: str, stop_at: int | None, resume: bool,
) -> list[Step]:  # fmt: skip
    """The loop of Accelerate's examples, with accumulate(), clipping, and save_state."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    network, tokenizer, rows = prepare(model, train, max_length, no_dropout, seed)
    loader = DataLoader(rows, shuffle=True, batch_size=micro, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    # The prepared scheduler steps once per process; the examples count its steps before preparing.
    scheduler = get_scheduler("linear", optimizer, 0, updates * accelerator.num_processes)
    network, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    steps: list[Step] = []
    done = 0
    if resume:
        accelerator.load_state(f"{out}/state")
        done = json.loads(Path(out, "state", "done.json").read_text())
        loader = accelerator.skip_first_batches(loader, done * accumulation)
    network.train()
    window = []
    for batch in loader:
        with accelerator.accumulate(network):
            loss = network(**batch).loss
            window.append(accelerator.gather(loss.detach()).mean())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            steps.append({"step": done, "loss": float(torch.stack(window).mean()), "grad_norm": float(norm)})
            window = []
            if done in (stop_at, updates):
                break
    if stop_at:
        accelerator.save_state(f"{out}/state")
        Path(out, "state", "done.json").write_text(json.dumps(done))
    elif accelerator.is_main_process:
        save_weights(accelerator.unwrap_model(network), out)
    return steps


PEERS = {"trainer": trainer, "plain": plain}

if __name__ == "__main__":
    found = PEERS[sys.argv[1]](**json.loads(sys.argv[2]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)  # gloo sometimes aborts a process that exits in the ordinary way
