"""What an update costs besides its arithmetic: the host never waits for the device, gradients are exchanged
once, and nothing stays in memory."""

import gc
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import FORK, FORKS, flags, forget_accelerator, launch, train_here
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

import ft.invariance
import ft.run
import train
from ft.health import LateReader
from ft.run import Run

WORDS = {"logging_steps": 10**6, "eval_strategy": "no", "save_strategy": "no", "learning_rate": 1e-3}
EARLY, LATE = 62, 167  # updates; an epoch has seven
# Operators and methods whose result, or its shape, the host must wait for.
READING = (
    "_local_scalar_dense item equal is_nonzero nonzero nonzero_numpy masked_select unique_consecutive "
    "_unique _unique2 unique_dim bincount histc allclose"
).split()
METHODS = "item tolist numpy __array__ __bool__ __int__ __float__ __index__ cpu".split()
# Allowed: the loader draws its workers' seed on the host, once per epoch.
ALLOWED = "torch/utils/data/dataloader.py"


def allowed():
    """Whether it is nearby on the stack, or the only reader of the loop: of two numbers whose copy to the
    host started an update before."""
    frame = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            break
        is_late = frame.f_code is LateReader.pop.__code__ and frame.f_locals["keep"] == 1
        if is_late or frame.f_code.co_filename.endswith(ALLOWED):
            return True
        frame = frame.f_back
    return False


class Operators(TorchDispatchMode):
    """Notes the operators that read, including boolean indices and repeats of unknown number."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], list) else ()
        by_mask = any(getattr(index, "dtype", None) in (torch.bool, torch.uint8) for index in indices)
        counted = name == "repeat_interleave" and kwargs.get("output_size") is None
        if (name in READING or by_mask or counted) and not allowed():
            self.reads.append(name)
        return func(*args, **kwargs)


class Methods(TorchFunctionMode):
    """Notes the methods of a tensor that read, some of them without an operator."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        named = [place for place in (*args[1:], kwargs.get("device")) if isinstance(place, str)]
        waits = name == "to" and "cpu" in named and not kwargs.get("non_blocking")
        if (name in METHODS or waits) and not allowed():
            self.reads.append(f"Tensor.{name}")
        return func(*args, **kwargs)


@pytest.fixture
def train_watched(monkeypatch):
    """Runs train.py; returns what the host reads from the first update to the last, and what after it."""
    whole, reads, after, stack = train.train, [], [], ExitStack()

    class Watched(Run):
        def start(self, *args):
            progress = super().start(*args)
            self.modes = [stack.enter_context(mode) for mode in (Operators(reads), Methods(reads))]
            return progress

        def count(self, *args):
            super().count(*args)
            if self.finished():  # then it logs
                for mode in self.modes:
                    mode.reads = after

        def settle(self):
            stack.close()
            super().settle()

    monkeypatch.setattr(train, "train", lambda config: whole(config, Watched))

    def run(**words):
        with stack:
            assert train_here(**words) == 0
        return reads, after

    return run


OPTIONS = {
    "max_length": 12, "long_text": "windows", "ema_decay": 0.9, "layerwise_lr_decay": 0.9,
    "class_weights": "balanced", "focal_gamma": 2.0, "gradient_checkpointing": "true",
}  # fmt: skip
KINDS = [
    pytest.param("reviews", {"per_device_train_batch_size": 8}, id="accumulation"),
    pytest.param("reviews", {"dropout_mode": "torch"}, id="torch's dropout"),
    pytest.param("reviews", OPTIONS, id="options"),
    pytest.param("tags", {"pos_weight": "balanced", "focal_gamma": 1.5}, id="several labels"),
    pytest.param(
        "scores", {"label_column_name": "score", "lora_rank": 4, "lora_dropout": 0.1}, id="scores, LoRA"
    ),
]
of_many_architectures = pytest.mark.parametrize(
    "kind, sizes",
    [
        ("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}),
        ("mpnet", {}),  # its own attention
        ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
        ("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 8}),
        ("llama", {"num_key_value_heads": 1}),
    ],
)


def another(tiny_model, tmp_path, kind, sizes):
    """A tiny random model of another architecture."""
    own = {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    shutil.copytree(tiny_model, tmp_path / "model")
    AutoModel.from_config(AutoConfig.for_model(kind, **own | sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("data, words", KINDS)
def test_no_update_has_the_host_wait_for_the_device(
    base_flags, kinds, monkeypatch, train_watched, precision, data, words
):
    if data != "reviews":
        words = words | {"dataset_name": kinds / data}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    reads, after = train_watched(**base_flags | WORDS | words)
    assert reads == []
    assert {"_local_scalar_dense", "Tensor.__float__"} <= set(after)  # the log of the last update is noticed


@pytest.mark.parametrize("longest", [64, 4], ids=["padded", "not padded"])
@of_many_architectures
def test_nor_does_it_for_another_architecture(
    base_flags, tiny_model, tmp_path, train_watched, kind, sizes, longest
):
    words = {"model_name_or_path": another(tiny_model, tmp_path, kind, sizes), "max_length": longest}
    reads, _ = train_watched(**base_flags | WORDS | words)
    assert reads == []


class Made(Exception):
    """The updates are done; what follows reads."""


class OneDevice(TorchDispatchMode):
    """An operator on tensors of two devices is an error, except numbers and copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func.overloadpacket is torch.ops.aten._fused_adamw_:  # which torch lacks for it
            return None
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(devices) < 2 or func.overloadpacket is torch.ops.aten.copy_, f"{func}: {devices}"
        return func(*args, **kwargs or {})


class WithoutValues(Run):
    """Ends after three updates on torch's device "meta", whose tensors have no values."""

    modes: ExitStack

    def start(self, *args):
        progress = super().start(*args)
        self.health.push = lambda *args: None  # whose host copy is in pinned memory
        self.modes.enter_context(OneDevice())
        return progress

    def count(self, losses, grad_norm, slot):
        assert {tensor.device.type for tensor in (grad_norm, *losses)} == {"meta"}
        super().count(losses, grad_norm, slot)
        if self.progress.step == 3:
            raise Made


@pytest.fixture
def on_another_device(monkeypatch):
    """Runs train.py on a device other than the host's, where reading any value fails."""
    key_dropout, whole = ft.invariance.key_dropout, train.train

    def moved(model, *args):
        keyed = key_dropout(model, *args)  # which tests the model where it was loaded
        model.to("meta")  # before there is an optimizer: unlike for a GPU, this creates new parameters
        return keyed

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    monkeypatch.setattr(ft.invariance, "key_dropout", moved)
    optimizers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(train, "train", lambda config: whole(config, WithoutValues))

    def run(**words):
        with pytest.raises(Made), ExitStack() as WithoutValues.modes:
            train_here(**words)

    yield run
    forget_accelerator()  # which holds this device


@pytest.mark.parametrize("data, words", KINDS)
def test_an_update_stays_on_its_device(base_flags, kinds, on_another_device, data, words):
    if data != "reviews":
        words = words | {"dataset_name": kinds / data}
    on_another_device(**base_flags | WORDS | words)


@of_many_architectures
def test_so_does_that_of_another_architecture(
    base_flags, tiny_model, tmp_path, on_another_device, kind, sizes
):
    model = another(tiny_model, tmp_path, kind, sizes)
    on_another_device(**base_flags | WORDS | {"model_name_or_path": model})


def test_memory_is_flat_over_updates_with_their_logs_evaluations_and_checkpoints(base_flags):
    """Nothing grows over fifteen epochs; `python -m benchmarks growth` runs 10,000 updates."""
    words = flags(**base_flags | {"logging_steps": 3, "max_train_steps": LATE + 7})
    done = launch(FORK, [str(EARLY), str(LATE), *words], script="tests/weighed.py")
    assert done.returncode == 0, done.stderr
    early, late = json.loads(Path(f"{base_flags['output_dir']}.json").read_text())
    tensors, of_tensors, of_python, objects = (
        after - before for before, after in zip(early, late, strict=True)
    )
    assert tensors == 0 and objects < 10
    assert max(of_tensors, of_python) < 30_000  # those of a batch, which differ; 290 per update


def test_an_evaluation_holds_scores_alone(base_flags, monkeypatch):
    """Of each batch, only the number, the scores and the loss of every row."""
    alive, whole = [], ft.run.evaluate

    def of_tensors():
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def weighed(accelerator, task, model, loader, rows, named, after_batch, **options):
        def after(count):
            alive.append(of_tensors() if len(alive) in (9, 29) else None)
            after_batch(count)

        return whole(accelerator, task, model, loader, rows, named, after, **options)

    monkeypatch.setattr(ft.run, "evaluate", weighed)
    words = {"per_device_eval_batch_size": 2, "max_train_steps": 1, "eval_strategy": "steps"}
    assert train_here(**base_flags | words) == 0
    assert len(alive) == 31 + 24  # validation and test rows
    of_row = 8 + 3 * 4 + 4
    assert alive[29] - alive[9] <= 20 * 2 * of_row


def counted(base_flags, *first, **words):
    """What two processes exchanged in micro-batches of four rows."""
    words = flags(**base_flags | WORDS | {"per_device_train_batch_size": 4} | words)
    done = launch(FORKS, [*first, *words], script="tests/counted.py")
    assert done.returncode == 0, done.stderr
    assert "2 processes x 4 rows x 4 accumulation steps" in done.stdout
    found = json.loads(Path(f"{base_flags['output_dir']}.json").read_text())
    assert found["view"] and not found["unused"] and not found["buffers"]
    return found


def of_update(found, update):
    """Names and sizes of an update's collectives, besides DDP's and one of host numbers: three say whether a
    process was asked to stop, and the fourth is the loss of the previous update."""
    here = [(name, size) for step, name, size in found["others"] if step == update]
    numbers = [size for name, size in here if name == "all_reduce" and size <= 4]
    assert numbers == ([3] if update == 1 else [4])
    return [(name, size) for name, size in here if name != "all_reduce" or size > 4]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux alone")
def test_two_processes_of_a_host_exchange_gradients_once_an_update_in_its_memory(base_flags):
    found = counted(base_flags)
    # DDP is left with the smallest weight, the bias of a head of three classes.
    assert found["rounds"] == [[update, 0, True, 3] for update in range(found["updates"])]
    for update in range(1, found["updates"]):
        assert of_update(found, update) == [("barrier", 0), ("barrier", 0)]


def test_two_processes_of_two_hosts_exchange_gradients_once_an_update(base_flags):
    found = counted(base_flags, "apart")
    # A bucket of all weights except the word embeddings; of those, which rows are used, then the rows.
    words, width = found["table"]
    rest = found["trained"] - words * width
    assert found["rounds"] == [[update, 0, True, rest] for update in range(found["updates"])]
    for update in range(1, found["updates"]):
        (_, used), (_, rows) = of_update(found, update)
        assert used == words and 0 < rows < words * width and rows % width == 0


def test_without_a_table_of_its_own_all_gradients_are_one_exchange(base_flags):
    """As on GPUs, which include the word embeddings: in one pass, in buckets of 25 MB if there are more."""
    found = counted(base_flags, "apart", freeze="embeddings")
    rounds = [[update, 0, True, found["trained"]] for update in range(found["updates"])]
    assert found["rounds"] == rounds
    for update in range(1, found["updates"]):
        assert of_update(found, update) == []
