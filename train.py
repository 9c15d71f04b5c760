"""Fine-tune a pretrained Transformers model: `accelerate launch train.py [CONFIG.yaml] [--flag value ...]`.

Without arguments it runs the quickstart. Read from top to bottom, this file is what a run does. Precedence
of options: defaults < YAML < command line."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from ft.cli import parse
from ft.config import Config
from ft.errors import EXIT_DONE
from ft.runtime import run_script

QUICKSTART = Path(__file__).parent / "ft" / "recipes" / "quickstart.yaml"


def train(config: Config, run_class: Callable | None = None) -> int:
    """One training run; returns its exit code. `run_class` replaces `Run`."""
    if config.verify:
        from ft.verify import verify

        return verify(config)
    if config.preflight:
        from ft.preflight import preflight

        return preflight(config, train)
    if config.num_seeds > 1:
        from ft.seeds import train_seeds

        return train_seeds(config, train)

    # Imported here, after the command line was parsed, so that --help and typos are answered at once.
    from ft.attempts import Attempts
    from ft.data.loader import PlanSampler, RowDataset, build_loader, updates
    from ft.data.prepare import prepare_data
    from ft.ddp import prepare_for_ddp
    from ft.finish import finish
    from ft.health import spread_nonfinite
    from ft.invariance import key_dropout
    from ft.layers import compile_layers
    from ft.model import build_model
    from ft.optim import build_optimizer, build_scheduler, clip_in_step
    from ft.pretrained import load_model_config, load_tokenizer, longest_text
    from ft.run import Run
    from ft.runtime import build_accelerator, reseed, resolve_batch_size, seed_generators, total_updates
    from ft.tasks import build_task
    from ft.words import train_used_words

    # --- accelerator, task, data ----------------------------------------------------------------------------
    accelerator = build_accelerator(config)
    notes = resolve_batch_size(config, accelerator.num_processes)
    task = build_task(config)
    run = (run_class or Run)(config, accelerator, task)

    model_config = load_model_config(config)
    tokenizer = load_tokenizer(config, model_config)
    max_length = longest_text(config.max_length, tokenizer, model_config)
    data = prepare_data(config, task, tokenizer, max_length, run.bar)

    # --- model, optimizer, schedule, loader -----------------------------------------------------------------
    seed_generators(config.seed)  # the new head
    model = build_model(config, task, model_config, tokenizer, notes)
    run.compare_hosts(data, model)
    train_used_words(model, tokenizer, data.tokens, run.hosts)
    exchange_gradients = prepare_for_ddp(model, accelerator, run.hosts)
    compiled_length = data.splits["train"].longest if config.torch_compile else None
    row_keys, unkeyed = key_dropout(model, config.dropout_mode, config.seed, compiled_length)
    if config.torch_compile:
        compile_layers(model)
    dataset = RowDataset(data.splits["train"], tokenizer, task.row_weights(data.splits["train"].labels))
    sampler = PlanSampler(
        dataset, config.global_batch_size, config.seed, accelerator.num_processes,
        config.per_device_train_batch_size,
    )  # fmt: skip
    total = total_updates(config, sampler.updates_per_epoch)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, total)
    loader = build_loader(dataset, sampler, config.dataloader_num_workers, accelerator.device)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    # --- the loop -------------------------------------------------------------------------------------------
    notes += [f"not the same on another launch: {place}" for place in unkeyed]
    progress = run.start(model, optimizer, scheduler, sampler, data, tokenizer, max_length, total, notes)
    attempts = Attempts(accelerator, optimizer, model)
    model.train()
    for _epoch in run.epochs():
        for micro_batches in run.throughput.waited(updates(loader)):
            for attempt in attempts.at(micro_batches):
                with attempt:
                    reseed(config.seed, progress.step, accelerator.process_index)
                    loss, losses = None, []  # frees the graph of an attempt that ran out of memory
                    for micro_batch in attempt:
                        row_keys.set(progress.step, micro_batch.piece_ids)
                        # Once per update; shards every time, or each process would hold whole gradients.
                        exchanged = micro_batch.slot.is_last or accelerator.is_fsdp2
                        with nullcontext() if exchanged else accelerator.no_sync(model):
                            loss = task.loss(model, micro_batch)  # a sum over rows
                            spread_nonfinite(loss)
                            # The mean over the update's rows, undoing DDP's mean over the processes.
                            accelerator.backward(
                                loss * (accelerator.num_processes / micro_batch.slot.update_weight)
                            )
                        losses.append(loss.detach())
                    exchange_gradients()  # those that DDP does not handle, on CPUs
                    accelerator.unscale_gradients()  # for fp16
                    grad_norm = clip_in_step(optimizer, model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            learning_rates = scheduler.get_last_lr()
            scheduler.step()
            progress.step += 1

            run.count(losses, grad_norm, micro_batch.slot)
            if run.due("steps", config.logging_steps):
                run.log(grad_norm, learning_rates)
            if run.due(config.eval_strategy, config.eval_steps):
                run.evaluate()
            if run.due(config.save_strategy, config.save_steps):
                run.save()
            run.stop_if_asked()  # by a signal or max_time: saves, and ends with exit code 75
            if run.finished():
                break

    finish(run)
    return EXIT_DONE


if __name__ == "__main__":
    run_script(train, parse(Config, defaults=str(QUICKSTART)))
