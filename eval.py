"""Score an exported model: `accelerate launch eval.py --model_name_or_path DIR [CONFIG.yaml] [--flag value
...]`, or compare two runs: `eval.py --compare RUN_A RUN_B`.

Uses train.py's evaluation with the same options, so it reproduces the numbers from training. Writes
results.json, report.html and the predictions to output_dir; if no row has a label, only predictions."""

from functools import partial
from pathlib import Path

from ft.cli import parse
from ft.config import EvalConfig
from ft.errors import EXIT_DONE, printable
from ft.runtime import run_script


def score(config: EvalConfig, sources: dict | None = None) -> int:
    """One evaluation, of `sources` if given instead of those that the config names; returns its exit
    code."""
    if config.compare is not None:
        from ft.compare import compare

        return compare(config, score)

    from ft.analysis.label_errors import check_cleanlab
    from ft.assess import assess, write_label_errors
    from ft.data.columns import Scoring
    from ft.data.loader import build_evaluation_loader
    from ft.data.prepare import prepare_data
    from ft.data.slices import read_slice_columns
    from ft.data.sources import choose_split, find_sources
    from ft.evaluation import evaluate, load_named_metrics, prefix_of
    from ft.evaluation_place import (
        check_apart,
        check_free,
        clear_evaluation,
        evaluation_folder,
        held,
    )
    from ft.hosts import HostGroup
    from ft.model import build_model, check_tokens
    from ft.output import check_place, write_whole
    from ft.page import write_page
    from ft.predict import predict
    from ft.prediction_files import PredictionFile, prediction_lines
    from ft.pretrained import (
        load_model_config,
        load_tokenizer,
        longest_text,
        precision_note,
        training_columns,
    )
    from ft.report import evaluation_notes, progress_bar, result_line
    from ft.runtime import build_accelerator
    from ft.tasks import build_task
    from ft.tracking import to_json
    from ft.unseen import check_unseen, fitted_on

    mark = config.mark()  # before the config is completed
    accelerator = build_accelerator(config)
    hosts = HostGroup(accelerator)
    hosts.from_main(lambda: check_place(Path(config.output_dir)))
    task = build_task(config)
    model_config = load_model_config(config)
    tokenizer = load_tokenizer(config, model_config)
    task.load_from_model(model_config)
    max_length = longest_text(config.max_length, tokenizer, model_config)
    notes: list[str] = []
    model = build_model(config, task, model_config, tokenizer, notes)
    sources = sources or find_sources(config)
    split = config.split or choose_split(config, sources)
    check_apart(config, split, sources.values())
    if config.suspected_label_errors:
        check_cleanlab()

    bar = partial(progress_bar, accelerator.is_local_main_process, leave=False)
    scoring = Scoring(*training_columns(config), config.id_column_name)
    data = prepare_data(config, task, tokenizer, max_length, bar, split, scoring, sources)
    hosts.check_same({"data": data.fingerprint})
    notes += [*check_unseen(config, data, split), *precision_note(config, accelerator.mixed_precision)]
    check_tokens(model, tokenizer, data.splits)
    rows = data.splits[split]
    if rows.labels is None:
        return predict(config, accelerator, hosts, task, model, tokenizer, data, split, notes, bar)

    hosts.from_main(lambda: check_free(config, split))
    named = load_named_metrics(config.metric_names, task, accelerator)
    hosts.from_main(lambda: read_slice_columns(config, data))
    loader = build_evaluation_loader(rows, tokenizer, config, accelerator)
    model, loader = accelerator.prepare(model, loader)

    with bar(total=len(rows), desc=f"evaluate {split}", unit="rows") as shown:
        result = evaluate(accelerator, task, model, loader, rows, named, shown.update)

    if accelerator.is_main_process:
        folder = evaluation_folder(config.output_dir, split)
        prefix = prefix_of(split)
        results = {"split": split, "rows": len(rows), "model": config.model_name_or_path, "options": mark}
        results |= {"sources": data.sources, "mixed_precision": accelerator.mixed_precision}
        found = assess(task, data, split, result, fitted_on=fitted_on(config, data, split))
        results["headline"] = list(task.headline)
        results |= {f"{prefix}/{key}": value for key, value in found.items()}
        predicted = prediction_lines(rows, data.columns, task, result.scores)
        said: list[str] = []
        with held(folder):
            with PredictionFile(folder, config, rows.table.schema) as file:
                file.write(predicted)
                file.close()
                notes += clear_evaluation(folder, file.path.name)
            results["predictions"] = file.path.name
            write_page(folder, config, task, data, results, {split: result}, accelerator)
            write_whole(folder / "results.json", to_json(results, indent=1) + "\n")
            if config.suspected_label_errors:
                said = [write_label_errors(folder, task, data, split, result.scores)]
        notes = [
            *data.notes,
            *notes,
            *(named.notes if named else []),
            *evaluation_notes(data.splits, accelerator.device),
        ]
        for line in [*(f"note: {note}" for note in notes), *said]:
            print(printable(line))
        print(f"{split}: {len(rows):,} rows: {result_line(results, prefix, task)}")
        print(f"written to {folder}: results.json, report.html, {file.path.name}")
    return EXIT_DONE


if __name__ == "__main__":
    run_script(score, parse(EvalConfig))
