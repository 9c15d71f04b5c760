"""Tiny random models, synthetic reviews, and launches: in this process, or real ones with a watchdog."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from forks import Fork  # noqa: E402
from spared import spared  # noqa: E402

from ft.launch import kill_launch  # noqa: E402

pytest_plugins = ["fault_table"]

# The same examples in every run, on a machine that may stall for a moment.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

# Variables of the user, the cluster or another launch that would change a run: a precision, a W&B project, a
# cache (where models from the stand-in for the Hub would stay, under real names), a proxy that does not reach
# this machine. HF_HOME is set for each session below, and forks of the session must keep it.
PREFIXES = (
    "ACCELERATE_", "FSDP_", "HF_", "HUGGINGFACE_", "TORCHELASTIC_", "TRACKIO_", "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
NAMES = (
    "WORLD_SIZE LOCAL_WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME NETRC HTTP_PROXY "
    "HTTPS_PROXY ALL_PROXY NO_PROXY"
).split()
for name in set(os.environ) - {"HF_HOME"}:
    if name.startswith(PREFIXES) or name.upper() in NAMES:
        del os.environ[name]

# Before any Hugging Face library is imported: no network, and a separate cache for this session.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before torch is imported: one thread, here and in every launch. Runs in this process are compared bit for
# bit with launched ones, and another number of threads sums in another order.
os.environ["OMP_NUM_THREADS"] = "1"

WORDS = {
    "bad": ["awful", "poor", "broken", "dull", "sad", "worst"],
    "fine": ["okay", "plain", "average", "usual", "decent", "fair"],
    "good": ["great", "lovely", "superb", "bright", "happy", "best"],
}
COMMON = ["the", "a", "this", "film", "book", "phone", "was", "is", "very", "and", "it", "not", "we", "saw"]


# The longest tests, of half a minute and more. Worksteal distributes tests by number, not by time: all other
# processes would wait for one of these that comes last.
LONGEST = (
    "test_a_preempted_job_is_requeued", "test_twenty_random_kills", "test_a_config_that_keeps_the_promise",
    "test_compiling_changes_no_number", "test_the_updates_that_count_have", "test_a_command_measures_and",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest tests first if several processes share them."""
    if hasattr(config, "workerinput"):  # one process keeps their order, that of the table of faults
        items.sort(key=lambda item: not item.name.startswith(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf-home"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_model`."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tokenizer of the tiny model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate cache for this test: what it prepares is encoded anew."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def make_tiny_model(folder: Path) -> Path:
    """A folder with a random BERT (2 layers of 32, dropout 0.1) and a tokenizer that knows the synthetic
    words, and as many that no text has: their embeddings are left out of training."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COMMON, *(w for group in WORDS.values() for w in group)]
    words = [*known, *(f"[unused{number}]" for number in range(len(known)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    set_seed(0)
    config = BertConfig(
        vocab_size=len(known), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Synthetic reviews of 4 to 40 words with three labels that follow from their words."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        label = generator.choice(list(WORDS))
        words = [generator.choice(COMMON) for _ in range(generator.randint(3, 36))]
        words += [generator.choice(WORDS[label]) for _ in range(1 + len(words) // 8)]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write some rows to a csv file; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_reviews`."""
    return make_reviews(tmp_path_factory.mktemp("reviews"))


def make_reviews(folder: Path) -> Path:
    """A folder with train.csv (203 rows), validation.csv (61) and test.csv (47)."""
    for seed, (name, count) in enumerate({"train": 203, "validation": 61, "test": 47}.items()):
        write_csv(folder / f"{name}.csv", make_rows(count, seed))
    return folder


def make_kinds(folder: Path) -> Path:
    """A folder with a data set for each kind of label, made from the reviews: tags (any number of labels per
    row, as jsonl), scores (numbers around 50, as csv) and pairs (whether two reviews have the same label)."""
    for seed, (name, count) in enumerate({"train": 203, "validation": 61, "test": 47}.items()):
        rows, others = make_rows(count, seed), make_rows(count, seed + 10)
        pairs = [
            {"one": a["text"], "two": b["text"], "label": "same" if a["label"] == b["label"] else "other"}
            for a, b in zip(rows, others, strict=True)
        ]
        write_csv(folder / "pairs" / f"{name}.csv", pairs)
        generator = random.Random(seed)
        level = {"bad": 20.0, "fine": 50.0, "good": 80.0}
        scores = [
            {"text": row["text"], "score": round(generator.gauss(level[row["label"]], 9), 2)} for row in rows
        ]
        write_csv(folder / "scores" / f"{name}.csv", scores)
        (folder / "tags").mkdir(exist_ok=True)
        with open(folder / "tags" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                words = row["text"].split()
                labels = [row["label"]] * (row["label"] != "fine") + ["long"] * (len(words) > 24)
                labels += ["rare"] * ("phone" in words and len(words) < 12)
                file.write(json.dumps({"text": row["text"], "labels": labels}) + "\n")
    return folder


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_kinds`."""
    return make_kinds(tmp_path_factory.mktemp("kinds"))


def flags(**values: Any) -> list[str]:
    """Command-line arguments: `flags(seed=1)` is ["--seed", "1"]."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def base_flags(tiny_model: Path, reviews: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of a few seconds: tiny model, reviews, output in this test's own folder."""
    return short_run(tiny_model, reviews, tmp_path / "run")


def short_run(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The same for a fixture that several tests share."""
    return {
        "model_name_or_path": model, "dataset_name": data, "output_dir": folder, "learning_rate": 1e-3,
        "num_train_epochs": 2, "logging_steps": 1,
    }  # fmt: skip


def train_here(*, drawn: bool = False, resampled: bool = False, **values: Any) -> int:
    """Run train.py's function in this process with the given flags; returns the exit code. See `spared` for
    `drawn` and `resampled`."""
    import train
    from ft.cli import parse
    from ft.config import Config
    from ft.errors import EXIT_STOPPED, Stopped
    from ft.signals import LAUNCHER_DIED, STOP_SIGNALS

    forget_accelerator()
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, LAUNCHER_DIED)}
    try:
        with spared(drawn, resampled):
            return train.train(parse(Config, flags(**values)))
    except Stopped:
        return EXIT_STOPPED
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def score_here(**values: Any) -> int:
    """The same for eval.py, which always writes its page."""
    import eval as script
    from ft.cli import parse
    from ft.config import EvalConfig

    forget_accelerator()
    with spared():
        return script.score(parse(EvalConfig, flags(**values)))


def forget_accelerator() -> None:
    """Let the next run of this process make an Accelerator of its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# A metric of the `evaluate` library, in a folder of its own.
METRIC = """
import datasets
import evaluate


class Errors(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int32")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"errors": sum(p != r for p, r in zip(predictions, references))}
"""


def metric_in(folder: Path, values: str) -> str:
    """A folder with a metric that returns `values`, an expression."""
    folder.mkdir()
    given = '{"errors": sum(p != r for p, r in zip(predictions, references))}'
    (folder / f"{folder.name}.py").write_text("import numpy as np\n" + METRIC.replace(given, values))
    return str(folder)


# A fork of a process that has imported everything, and two of them: to test what a run does, not its start.
FORK = ["fork", "1"]
FORKS = ["fork", "2"]
ONE = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
# --standalone finds a free port, so that launches do not conflict.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(
    command: list[str], words: list[str], script: str = "train.py", timeout: float = 240, **more: Any
) -> subprocess.CompletedProcess:
    """Really run a script; after `timeout` seconds all its processes are killed and the test fails. See
    `start` for `more`."""
    process = start(command, words, script, **more)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_launch(process)
        out, err = process.communicate(timeout=10)
        pytest.fail(f"hung for {timeout} s: {command}\n{out[-2000:]}\n{err[-4000:]}")
    finally:
        kill_launch(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(
    command: list[str], words: list[str], script: str = "train.py", *, drawn: bool = False,
    resampled: bool = False, **environment: str,
) -> subprocess.Popen[str] | Fork:  # fmt: skip
    """Start really running a script; the caller has to end it, see `started`. A fork is `spared` pages and
    resamples unless `drawn` or `resampled`; a separate process is spared nothing."""
    if command[0] == "fork":
        assert not environment, "what a library reads when it is imported cannot be changed for a fork"
        return Fork(script, words, int(command[1]), drawn, resampled)
    return subprocess.Popen(
        [*command, str(ROOT / script), *words], env={**os.environ, **environment}, cwd=ROOT, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def changed_train(path: Path, change: str) -> str:
    """Write a script that is train.py with some lines of Python run before it; returns its path."""
    text = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
{change}
import train
from ft.cli import parse
from ft.config import Config
from ft.runtime import run_script
run_script(train.train, parse(Config))
"""
    path.write_text(text)
    return str(path)


@pytest.fixture
def heeds_hangups() -> Iterator[None]:
    """This process and what it starts do not ignore SIGHUP, as they would under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib finds its list of fonts. Otherwise it says on stderr that it builds one, if that takes more
    than five seconds, or that it cannot write to the user's home."""
    import matplotlib.font_manager

    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str] | Fork]]:
    """`start` for a test; what is still running when that ends is killed."""
    processes: list[subprocess.Popen[str] | Fork] = []

    def start_and_note(*args: Any, **more: Any) -> subprocess.Popen[str] | Fork:
        processes.append(start(*args, **more))
        return processes[-1]

    yield start_and_note
    for process in processes:
        kill_launch(process)


def wait_for(path: Path, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Return as soon as a file exists; fail after `seconds`, or when `process` has ended."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} after {seconds} s"
        assert process is None or process.poll() is None, f"ended before there was a {path}"
        time.sleep(0.002)


def all_ended(processes: list[Any], seconds: float) -> bool:
    """Whether these processes (psutil's) end in time. If pytest is process 1, as in a container, orphans stay
    zombies."""
    import psutil

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + seconds
    while any(map(runs, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def two_processes() -> list[str]:
    """The command that launches two gloo processes on the CPU through Accelerate."""
    return [
        *ACCELERATE,
        "--config_file",
        str(ROOT / "accelerate_configs" / "multi_cpu.yaml"),
        "--main_process_port",
        "0",
    ]


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def series(output_dir: Path, key: str) -> dict[int, float]:
    """One quantity of metrics.jsonl by step."""
    return {row["step"]: row[key] for row in metrics_of(output_dir) if key in row}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# What can happen to a file on a disk.
DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "emptied": lambda path: path.write_bytes(b""),
    "one bit flipped": _flip,
    "deleted": Path.unlink,
}
