"""Rows encoded per second, against the bare tokenizers library; memory; seconds from the cache."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_data_options,
    at_least,
    class_file,
    column_flags,
    gemm_peak,
    in_turn,
    launch_and_weigh,
    median,
    median_and_spread,
    model_folder,
    own_cache,
    read_csv,
    save,
    say,
    spread,
    table,
    write_csv,
)

QUICK = {"rows": 20_000, "rounds": 1}
ARMS = {
    "ours": "train.py: encode, to a file",
    "whole": "train.py: read, check and encode",
    "library_1024": "tokenizers library, batch call of 1,024 rows alone",
    "library_4096": "tokenizers library, batch call of 4,096 rows alone",
    "cached": "train.py: from the cache",
}
LIBRARY = ("library_1024", "library_4096")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_data_options(parser)
    parser.add_argument(
        "--rows", type=at_least(2), default=1_000_000, help="made by repeating those of train.csv"
    )
    parser.add_argument("--max_length", type=int, default=128, help="longest text in tokens")
    parser.add_argument("--rounds", type=at_least(1), default=5)


def run(options: argparse.Namespace) -> None:
    """Encode into an empty cache, open it again, and run the bare library with calls of two sizes, each in a
    fresh process."""
    texts, _ = read_csv(class_file(options.data, "train"))
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    gemm = [gemm_peak()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        rows = range(options.rows)
        # Two classes, as train.py requires: the first rows of a sorted file have one.
        write_csv(path, [texts[row % len(texts)] for row in rows], ["ab"[row % 2] for row in rows])
        for number in range(options.rounds):
            turn = in_turn(["ours cached", *LIBRARY], number)  # from the cache of the previous one
            cache = Path(folder) / "cache"
            for arm in " ".join(turn).split():
                words = {
                    "model": model_folder(options.model), "path": str(path), "max_length": options.max_length,
                    "cache": str(cache),
                }  # fmt: skip
                out, peak = launch_and_weigh("-m", "benchmarks.encode", arm, json.dumps(words))
                seconds = json.loads(out.splitlines()[-1])
                for name, value in seconds.items():
                    measured[arm if name == "seconds" else name].append(
                        {"seconds": value, "peak_bytes": peak}
                    )
                say(f"round {number + 1}, {arm}: {seconds}, {peak / 1e6:,.0f} MB")
            shutil.rmtree(cache)
            gemm.append(gemm_peak())
            save(options, _text(options, measured), measured, gemm)


def _text(options: argparse.Namespace, measured: dict[str, list[dict[str, float]]]) -> str:
    library = zip(*([one["seconds"] for one in measured[arm]] for arm in LIBRARY), strict=True)
    fastest, rows = [min(of_round) for of_round in library], []
    for arm, runs in measured.items():
        seconds = [one["seconds"] for one in runs]
        ratios = [best / one["seconds"] for one, best in zip(runs, fastest, strict=True)]
        peak = median_and_spread([one["peak_bytes"] / 1e6 for one in runs], 0)
        ratio = median_and_spread(ratios, 2) if arm in ("ours", "whole") else ""
        cells = [f"{median(seconds):.2f}", spread(seconds, 2), f"{options.rows / median(seconds):,.0f}"]
        rows.append([ARMS[arm], *cells, ratio, peak])
    header = [
        "",
        "seconds, median",
        "min to max",
        "rows/s",
        "speed against the library's faster call",
        "peak memory, MB",
    ]
    return (
        f"{table(header, rows)}\n\n{options.rows:,} rows of {options.data.name}, over again; rounds done: "
        f"{len(fastest)}. Imports and loading of the tokenizer are left out. The library keeps nothing of "
        "what it makes, and its faster call is that of each round; ours writes to the disk, lengths, too. "
        "The heap of ours is set as train.py sets it."
    )


def ours(model: str, path: str, max_length: int, cache: str) -> dict[str, float]:
    """Seconds of `prepare_data` as train.py calls it ("whole"), and of its encoding."""
    from ft.heap import start_again

    start_again()  # with train.py's heap, which a run has by then
    from transformers import AutoTokenizer

    from ft.config import Config
    from ft.data.prepare import prepare_data
    from ft.report import progress_bar
    from ft.tasks import build_task

    times: list[float] = []

    @contextmanager
    def progress(**_: Any) -> Any:
        times.append(time.perf_counter())
        yield progress_bar(False)
        times.append(time.perf_counter())

    config = Config(
        model_name_or_path=model, train_file=path, validation_split_percentage=0, long_text="truncate",
        **column_flags(Path(path)),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    begin = time.perf_counter()
    with own_cache(cache):
        prepare_data(config, build_task(config), tokenizer, max_length, progress)
    whole = time.perf_counter() - begin
    return {"seconds": times[1] - times[0], "whole": whole} if times else {"seconds": whole}


def library(model: str, path: str, max_length: int, cache: str, call: int) -> dict[str, float]:
    """Seconds of the tokenizers library over all rows, `call` per batch call; the fast one leaves out
    offsets, as train.py does."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(model).backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length)
    texts, _ = read_csv(path)
    begin = time.perf_counter()
    for start in range(0, len(texts), call):
        backend.encode_batch_fast(texts[start : start + call])
    return {"seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    arm, _, call = sys.argv[1].partition("_")
    words = json.loads(sys.argv[2])
    print(json.dumps(library(**words, call=int(call)) if arm == "library" else ours(**words)))
