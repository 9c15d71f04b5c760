"""Numerical failures, out of memory, and deterministic algorithms."""

import json
import weakref

import pytest
import torch
from compare import largest_difference, same_bits
from conftest import FORKS, changed_train, flags, launch, series, short_run, train_here
from safetensors.torch import load_file
from test_hangs import FAULTY

from ft.errors import UserError
from ft.health import SPIKE_AFTER, Health
from ft.tasks.text_classification import TextClassification

SAVED = {"max_train_steps": 10, "save_strategy": "steps", "save_steps": 2}
EACH = {"save_steps": 1, "save_total_limit": 50, "eval_strategy": "no"}


@pytest.fixture
def config(base_flags):
    return {**base_flags, **SAVED}


def break_updates(monkeypatch, steps, value):
    """Replace the loss of some updates (counted from 1, one micro-batch each), and its gradient, by another
    value."""
    original, calls = TextClassification.loss, []

    def loss(self, model, batch):
        calls.append(1)
        whole = original(self, model, batch)
        return whole * value if len(calls) in steps else whole

    monkeypatch.setattr(TextClassification, "loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.case(
    "a loss of NaN or infinity in three updates of ten",
    "those change nothing, are counted and said with their rows; every checkpoint is finite",
)
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(
    config, tmp_path, monkeypatch, capfd, value
):
    break_updates(monkeypatch, {3, 4, 7}, value)
    assert train_here(**{**config, **EACH}) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["train/nonfinite_updates"] == 3
    out = capfd.readouterr().out
    assert "update 3 is skipped" in out and "update 7 is skipped" in out and "counted from 0" in out
    moved = [step for step in range(2, 11) if not nothing_moved(tmp_path / "run", step - 1, step)]
    assert moved == [2, 5, 6, 8, 9, 10]
    for checkpoint in [tmp_path / f"run/checkpoints/step-{step:08d}" for step in range(1, 11)]:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        held = [*load_file(checkpoint / "model.safetensors").values()]
        held += [tensor for entry in state.values() for tensor in entry.values()]
        assert all(torch.isfinite(tensor).all() for tensor in held)


@pytest.mark.case(
    "NaN in three updates in a row",
    "exit 2; the message names the rows of the first",
)
def test_the_third_in_a_row_ends_the_run_and_names_the_rows_of_the_first(config, tmp_path, monkeypatch):
    break_updates(monkeypatch, {4, 5, 6, 7}, float("nan"))
    with pytest.raises(UserError, match=r"3 updates in a row, 6 the last.*training rows are \d+, \d+.*skip"):
        train_here(**config)


@pytest.mark.case(
    "NaN in five updates in a row, with `on_nonfinite: skip`",
    "skipped and counted",
)
def test_skip_goes_on_in_any_case(config, tmp_path, monkeypatch):
    break_updates(monkeypatch, {4, 5, 6, 7, 8}, float("nan"))
    assert train_here(**config, on_nonfinite="skip") == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["train/nonfinite_updates"] == 5


def nothing_moved(folder, before, after):
    """Whether two checkpoints have the same weights and optimizer state, bit for bit."""
    places = [folder / f"checkpoints/step-{step:08d}" for step in (before, after)]
    weights = [load_file(place / "model.safetensors") for place in places]
    states = [torch.load(place / "optimizer.pt", weights_only=True)["optimizer"]["state"] for place in places]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) and all(
        torch.equal(states[0][number][name], states[1][number][name])
        for number in states[0]
        for name in states[0][number]
    )


@pytest.mark.case(
    "NaN in the last update",
    "its checkpoint holds the weights and the optimizer of the one before it, to the bit",
)
def test_the_last_update_may_be_the_one_that_is_skipped(config, tmp_path, monkeypatch):
    break_updates(monkeypatch, {10}, float("nan"))
    assert train_here(**{**config, **EACH}) == 0
    assert nothing_moved(tmp_path / "run", 9, 10) and not nothing_moved(tmp_path / "run", 8, 9)


# Each process writes its state after an update: hashes of weights and optimizer, and the next rate.
WITNESS = """
import hashlib, json
from ft.run import Run
count = Run.count
def hashed(tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()
def noted(self, *rest):
    count(self, *rest)
    states = [value for state in self.optimizer.state.values() for _, value in sorted(state.items())]
    held = hashed(self.model.parameters()), hashed(states), float(self.scheduler.get_last_lr()[0])
    with open(str(self.output_dir) + "-" + os.environ["RANK"], "a") as file:
        file.write(json.dumps(held) + "\\n")
Run.count = noted
"""


@pytest.mark.case(
    "a loss of infinity whose gradient is finite, on one of two processes alone",
    "on both the update changes no weight, no state of the optimizer and no learning rate",
)
def test_an_infinite_loss_with_a_finite_gradient_moves_nothing(config, tmp_path):
    fault = "return loss(self, model, batch) + float('inf')"
    faulty = FAULTY.format(fault=fault, rank="1")  # in update 5
    script = changed_train(tmp_path / "infinite.py", faulty + WITNESS)
    words = flags(**{**config, **EACH, "max_train_steps": 6})
    done = launch(FORKS, words, script=script)
    assert done.returncode == 0, done.stderr
    assert "update 5 is skipped: its loss or gradient is not finite (loss inf" in done.stdout
    assert nothing_moved(tmp_path / "run", 4, 5)
    assert not nothing_moved(tmp_path / "run", 3, 4) and not nothing_moved(tmp_path / "run", 5, 6)
    rates = list(series(tmp_path / "run", "train/learning_rate").values())
    assert rates[4] == rates[5] and len(set(rates)) == 5
    for rank in "01":
        held = [json.loads(line) for line in (tmp_path / f"run-{rank}").read_text().splitlines()]
        assert held[3] == held[4] and len(held) == 6
        for kind in zip(*held, strict=True):  # every other update changes all three
            assert len(set(kind)) == 5


@pytest.mark.case(
    "NaN in two updates before a stop, and in the next after the resume",
    "counts as three in a row; the rows of the first are named",
)
def test_updates_in_a_row_that_are_not_finite_are_counted_over_a_resume(config, monkeypatch):
    with monkeypatch.context() as patched:
        break_updates(patched, {3, 4}, float("nan"))
        assert train_here(**{**config, "max_train_steps": 4}) == 0
    break_updates(monkeypatch, {1}, float("nan"))
    with pytest.raises(UserError, match=r"3 updates in a row, 5 the last.*training rows are \d+, \d+"):
        train_here(**config, resume_from_checkpoint="latest")


@pytest.mark.case(
    "a loss far above its running mean",
    "counted as a spike",
)
def test_loss_spikes_are_counted():
    health = Health()
    for update in range(100):
        health.note(1.0 + 0.01 * (update % 5), finite=True)
    assert health.spikes == 0
    health.note(3.0, finite=True)
    assert health.spikes == 1 and health.nonfinite == 0
    early = Health()
    for loss in [0.7] * (SPIKE_AFTER - 1) + [70.0]:
        early.note(loss, finite=True)
    assert early.spikes == 0  # too few updates were seen
    for share, spikes in ((1.0, 1), (1 / 16, 0)):  # the mean of few rows strays further
        health = Health()
        for update in range(100):
            health.note(1.0 + 0.01 * (update % 5), finite=True)
        health.note(1.3, finite=True, share=share)
        assert health.spikes == spikes


@pytest.mark.case(
    "out of memory above 8 rows, at a micro-batch of 32",
    "halved twice, the update repeated, the same trajectory within 1e-5",
)
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_update(config, tmp_path, monkeypatch, capfd):
    assert train_here(**{**config, "output_dir": tmp_path / "whole"}) == 0
    original, sizes = TextClassification.loss, []

    def loss(self, model, batch):
        sizes.append(len(batch.row_ids))
        if len(batch.row_ids) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, model, batch)

    monkeypatch.setattr(TextClassification, "loss", loss)
    assert train_here(**config) == 0
    assert sizes[:7] == [32, 16, 8, 8, 8, 8, 8] and 32 not in sizes[1:]
    assert "micro-batches have at most 8 rows" in capfd.readouterr().out
    worst = largest_difference(tmp_path / "whole", tmp_path / "run")
    # Not eval/auroc: rounding may reverse the order of two rows with nearly the same score.
    assert max(worst[key] for key in ("train/loss", "train/grad_norm", "eval/loss", "weights")) <= 1e-5, worst


# On some of two processes, the model runs out of memory for more than 8 rows in its forward pass.
OUT_IN_FORWARD = """
import torch
import ft.ddp
prepare = ft.ddp.prepare_for_ddp
def out_of_memory(module, inputs, output):
    if module.training and len(output[0]) > 8:
        raise torch.OutOfMemoryError("out of memory")
def prepare_small(model, *rest):
    if os.environ["RANK"] in {ranks!r}:
        model.base_model.register_forward_hook(out_of_memory)
    return prepare(model, *rest)
ft.ddp.prepare_for_ddp = prepare_small
if {by!r} == "DDP":
    ft.ddp.shared_memory = lambda *_: None
"""


def out_in_forward(config, folder, ranks, by):
    """A run on two processes, of which those in `ranks` run out of memory; returns its output, too."""
    script = changed_train(folder / "small.py", OUT_IN_FORWARD.format(ranks=ranks, by=by))
    done = launch(FORKS, flags(**config), script=script)
    assert done.returncode == 0, done.stderr
    return config["output_dir"], done.stdout


@pytest.fixture(scope="module", params=["shared memory", "DDP"])
def exchanged(request, tmp_path_factory, tiny_model, reviews):
    """How two processes exchange gradients, and their run with enough memory."""
    folder = tmp_path_factory.mktemp("whole")
    words = {**short_run(tiny_model, reviews, folder / "run"), **SAVED}
    whole, said = out_in_forward(words, folder, "", request.param)
    assert "out of memory" not in said
    return request.param, whole


@pytest.mark.parametrize("ranks", ["1", "01"])
@pytest.mark.case(
    "the same in the forward pass of one of two processes or of both, at one micro-batch an update",
    "halved there, the update repeated, the same trajectory within 1e-5",
)
def test_out_of_memory_in_a_forward_pass_is_mended_on_several_processes(config, tmp_path, exchanged, ranks):
    """The other waits meanwhile in the gradient exchange, which happens once per update."""
    by, whole = exchanged
    run, said = out_in_forward(config, tmp_path, ranks, by)
    for rank in "01":
        assert (f"out of memory in process {rank}; micro-batches" in said) == (rank in ranks)
    worst = largest_difference(whole, run)
    assert max(worst[key] for key in ("train/loss", "train/grad_norm", "eval/loss", "weights")) <= 1e-5, worst


@pytest.mark.case(
    "out of memory in the backward pass",
    "the graph of that attempt is gone before the next begins",
)
def test_out_of_memory_in_the_backward_pass_lets_the_graph_go(config, monkeypatch):
    original, graphs = TextClassification.loss, []

    def loss(self, model, batch):
        assert not graphs or graphs[-1]() is None
        whole = original(self, model, batch)
        if len(batch.row_ids) > 8:
            graphs.append(weakref.ref(whole))
            whole.register_hook(out_of_memory)
        return whole

    monkeypatch.setattr(TextClassification, "loss", loss)
    assert train_here(**{**config, "max_train_steps": 1, "eval_strategy": "no"}) == 0
    assert len(graphs) == 2  # of 32 rows, and of 16


def out_of_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.case(
    "out of memory in an evaluation above 5 rows, at a batch of 61",
    "halved until it fits, with the remedy said; the same scores",
)
def test_out_of_memory_in_an_evaluation_halves_its_batches(config, tmp_path, monkeypatch, capfd):
    words = {**config, "max_train_steps": 2, "save_strategy": "no"}
    assert train_here(**{**words, "output_dir": tmp_path / "whole"}) == 0
    original, sizes = TextClassification.predict, []

    def predict(self, model, batch):
        sizes.append(len(batch.row_ids))
        return out_of_memory() if len(batch.row_ids) > 5 else original(self, model, batch)

    monkeypatch.setattr(TextClassification, "predict", predict)
    assert train_here(**words) == 0
    assert sizes[:5] == [61, 31, 16, 8, 4]
    assert "this evaluation continues with 4 rows at a time (--per_device_eval_" in capfd.readouterr().out
    worst = largest_difference(tmp_path / "whole", tmp_path / "run")
    assert worst["eval/loss"] <= 1e-6 and worst["weights"] == 0, worst
    monkeypatch.setattr(TextClassification, "predict", out_of_memory)
    with pytest.raises(UserError, match="out of memory in an evaluation, on a single row"):
        train_here(**words, overwrite_output_dir=True)


@pytest.mark.case(
    "out of memory on a single row",
    "exit 2; the message says what to do",
)
def test_out_of_memory_on_one_row_is_an_error(config, monkeypatch):
    def loss(self, model, batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TextClassification, "loss", loss)
    with pytest.raises(UserError, match="out of memory on a single row"):
        train_here(**config)


@pytest.mark.case(
    "the same on two processes three times, in two launches, with `deterministic` and without",
    "bit-identical",
)
def test_two_runs_of_one_launch_are_bit_identical(config, tmp_path):
    """On a CPU they always are; deterministic: true asks torch for it."""
    runs = {}
    for name, value in {"a": True, "b": True, "c": False}.items():
        words = {**config, "output_dir": tmp_path / name, "deterministic": value, "save_strategy": "no"}
        runs[name] = ("train", flags(**words))
    for jobs in ("a", "bc"):  # two launches
        (tmp_path / "jobs.json").write_text(json.dumps([runs[name] for name in jobs]))
        done = launch(FORKS, [str(tmp_path / "jobs.json")], script="tests/several.py")
        assert done.returncode == 0, done.stderr
    assert same_bits(tmp_path / "a/final", tmp_path / "b/final")
    assert same_bits(tmp_path / "a/final", tmp_path / "c/final")
    assert series(tmp_path / "a", "train/loss") == series(tmp_path / "c", "train/loss")
