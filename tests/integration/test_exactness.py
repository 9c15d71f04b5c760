"""One config, one result, any launch: the same losses and weights however an update is cut."""

import pytest
from compare import largest_difference
from conftest import TORCHRUN, flags, launch, metrics_of, train_here, two_processes

NO_DROPOUT = "hidden_dropout_prob=0,attention_probs_dropout_prob=0"
STEPS = 50  # 203 rows: 7 updates of 32 an epoch, the last of 11


@pytest.fixture(scope="module")
def config(tiny_model, reviews):
    return {
        "model_name_or_path": tiny_model, "dataset_name": reviews, "learning_rate": 3e-3, "warmup_ratio": 0.1,
        "num_train_epochs": 99, "max_train_steps": STEPS, "logging_steps": 1, "eval_strategy": "steps",
        "eval_steps": 20, "save_strategy": "no", "max_grad_norm": 0.5,
    }  # fmt: skip


@pytest.fixture(scope="module", params=["dropout off", "dropout on"])
def variant(request):
    return {"config_overrides": NO_DROPOUT} if request.param == "dropout off" else {}


@pytest.fixture(scope="module")
def reference(config, variant, tmp_path_factory):
    """One process, the whole update as one batch."""
    output = tmp_path_factory.mktemp("reference") / "run"
    assert train_here(**config, **variant, global_batch_size=32, output_dir=output) == 0
    losses = [row["train/loss"] for row in metrics_of(output) if "train/loss" in row]
    assert (
        len(losses) == STEPS and min(losses) < 0.85 * losses[0]
    )  # it learns: the comparison means something
    return output


def assert_same(one, other):
    for key, difference in largest_difference(one, other).items():
        # A metric of predictions may not differ at all.
        assert difference <= (
            1e-5 if key.startswith(("train/", "eval/loss", "eval/auroc", "weights")) else 0
        ), key


def test_one_process_with_accumulation_8(config, variant, reference, tmp_path):
    words = {**config, **variant, "global_batch_size": 32, "per_device_train_batch_size": 4}
    assert train_here(**words, output_dir=tmp_path / "run") == 0
    assert_same(reference, tmp_path / "run")


@pytest.mark.parametrize("micro", [16, 4])
def test_two_processes(config, variant, reference, tmp_path, micro):
    words = flags(**config, **variant, global_batch_size=32, per_device_train_batch_size=micro)
    done = launch(two_processes(), [*words, *flags(output_dir=tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert f"2 processes x {micro} rows x {16 // micro} accumulation" in done.stdout
    assert_same(reference, tmp_path / "run")


def test_shares_that_do_not_divide_and_fewer_rows_than_processes(config, variant, tmp_path):
    """Global batch 31 on two processes; 187 rows leave an update of one row, so one process has none."""
    words = {**config, **variant, "global_batch_size": 31, "max_train_samples": 187, "max_train_steps": 20}
    assert train_here(**words, output_dir=tmp_path / "one") == 0
    words["per_device_train_batch_size"] = 5
    done = launch([*TORCHRUN, "2"], flags(**words, output_dir=tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one", tmp_path / "two")


def test_the_product_of_micro_batch_accumulation_and_processes_is_the_global_batch(config, tmp_path):
    words = {
        **config,
        "max_train_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
    }
    done = launch(two_processes(), flags(**words, output_dir=tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "global batch 24 = 4 rows x 3 accumulation steps x 2 processes" in done.stdout
    words = {**config, "max_train_steps": 3, "global_batch_size": 24}
    assert train_here(**words, output_dir=tmp_path / "one") == 0
    assert_same(tmp_path / "one", tmp_path / "run")


def test_torchs_own_dropout_is_not_the_same_on_another_launch(config, tmp_path):
    """The reason for row-keyed dropout, and the proof that these tests can fail."""
    words = {**config, "dropout_mode": "torch", "max_train_steps": 10}
    assert train_here(**words, output_dir=tmp_path / "one") == 0
    assert train_here(**words, per_device_train_batch_size=4, output_dir=tmp_path / "eight") == 0
    assert largest_difference(tmp_path / "one", tmp_path / "eight")["train/loss"] > 1e-3
