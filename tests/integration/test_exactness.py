"""One config, one result, any launch: the same losses and weights however an update is split."""

import json

import pytest
from compare import assert_same, largest_difference
from conftest import FORKS, flags, launch, series, train_here

NO_DROPOUT = "hidden_dropout_prob=0,attention_probs_dropout_prob=0"
# Early stopping comes after 52 updates, its best is at 26. An epoch of 203 rows: 6 updates of 32, one of 11.
CONFIG = {
    "learning_rate": 5e-3, "warmup_ratio": 0.1, "num_train_epochs": 99, "max_train_steps": 70,
    "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 13, "metric_for_best_model": "f1_macro",
    "early_stopping_patience": 2, "save_strategy": "no", "max_grad_norm": 0.5,
}  # fmt: skip
# Training data, and the launches that must give the same as one process with whole updates.
DATA = {
    "batch 32": {"global_batch_size": 32},
    "batch 32, no dropout": {"global_batch_size": 32, "config_overrides": NO_DROPOUT},
    # 187 rows: six updates of 31 rows, then one of a single row, of which other processes get none.
    "batch 31": {"global_batch_size": 31, "max_train_samples": 187},
}
LAUNCHES = [
    # data, processes, most rows in a micro-batch, what the summary says
    ("batch 32", 1, 8, "global batch 32 = 1 process x 8 rows x 4 accumulation steps"),
    ("batch 32", 1, 4, "global batch 32 = 1 process x 4 rows x 8 accumulation steps"),
    ("batch 32", 2, 16, "global batch 32 = 2 processes x 16 rows x 1 accumulation step"),
    ("batch 32", 2, 4, "global batch 32 = 2 processes x 4 rows x 4 accumulation steps"),
    ("batch 32, no dropout", 2, 4, "global batch 32 = 2 processes x 4 rows x 4 accumulation steps"),
    ("batch 31", 2, 5, "global batch 31 <= 2 processes x 5 rows x 4 accumulation steps"),
    ("batch 31", 3, 31, "global batch 31 <= 3 processes x 11 rows x 1 accumulation step"),
]


@pytest.fixture(scope="module")
def config(tiny_model, reviews):
    return {"model_name_or_path": tiny_model, "dataset_name": reviews, **CONFIG}


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """One process, every update as one batch; run once for each data set."""
    made = {}

    def make(data):
        if data not in made:
            made[data] = tmp_path_factory.mktemp("reference") / "run"
            assert train_here(**config, **DATA[data], output_dir=made[data]) == 0
            losses = list(series(made[data], "train/loss").values())
            assert len(losses) >= 50 and min(losses) < 0.6 * losses[0]  # it learns: comparing is meaningful
            stopped, best = ends(made[data])
            assert 0 < best < stopped < CONFIG["max_train_steps"]  # early, and not at its best
        return made[data]

    return make


def ends(output):
    """The step of early stopping, and the best step."""
    results = json.loads((output / "results.json").read_text())
    return results["train/total_steps"], results["best/step"]


@pytest.mark.parametrize(("data", "processes", "micro", "said"), LAUNCHES)
def test_a_launch_gives_what_one_process_with_whole_updates_gives(
    config, reference, tmp_path, capfd, data, processes, micro, said
):
    words = {
        **config, **DATA[data], "per_device_train_batch_size": micro, "output_dir": tmp_path / "run",
    }  # fmt: skip
    whole = reference(data)
    capfd.readouterr()
    if processes == 1:
        assert train_here(**words) == 0
        out = capfd.readouterr().out
    else:
        done = launch(["fork", str(processes)], flags(**words))
        assert done.returncode == 0, done.stderr
        out = done.stdout
    assert said in out
    assert_same(whole, tmp_path / "run", weights=1e-4)
    assert ends(whole) == ends(tmp_path / "run")


@pytest.mark.parametrize(("data", "processes", "micro"), [("batch 32", 2, 4), ("batch 31", 3, 31)])
def test_processes_that_share_no_memory_give_the_same(config, reference, tmp_path, data, processes, micro):
    """Like those of several hosts. DDP exchanges gradients there, and on GPUs."""
    words = {**config, **DATA[data], "per_device_train_batch_size": micro, "output_dir": tmp_path / "run"}
    done = launch(["fork", str(processes)], flags(**words), script="tests/apart.py")
    assert done.returncode == 0, done.stderr
    assert_same(reference(data), tmp_path / "run", weights=1e-4)


def test_the_product_of_micro_batch_accumulation_and_processes_is_the_global_batch(config, tmp_path):
    words = {
        **config,
        "max_train_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
    }
    done = launch(FORKS, flags(**words, output_dir=tmp_path / "run"))
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


def test_weights_that_a_model_never_uses_stop_no_launch(tiny_model, reviews, tmp_path):
    """ESM and XLNet have some: DDP fails on them unless it is told."""
    from transformers import AutoTokenizer, EsmConfig, EsmModel, set_seed

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    set_seed(0)
    model = EsmModel(
        EsmConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=80, pad_token_id=tokenizer.pad_token_id,
            position_embedding_type="rotary", hidden_dropout_prob=0.1,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "esm")
    tokenizer.save_pretrained(tmp_path / "esm")
    words = {
        "model_name_or_path": tmp_path / "esm", "dataset_name": reviews, "learning_rate": 1e-3,
        "global_batch_size": 16, "max_train_steps": 6, "logging_steps": 1,
    }  # fmt: skip
    assert train_here(**words, output_dir=tmp_path / "one") == 0
    done = launch(FORKS, flags(**words, output_dir=tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one", tmp_path / "two")
