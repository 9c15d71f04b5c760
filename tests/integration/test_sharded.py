"""FSDP2: each process holds a shard of the model, and a run gives the same as one process with all of it.

On CPUs, over gloo: Accelerate would not shard the model there, so ft/fsdp.py makes it, as on GPUs."""

import json
import shutil

import pytest
import yaml
from compare import KEYS_BIAS, largest_difference, same_bits
from conftest import ACCELERATE, FORKS, ROOT, flags, launch, score_here, series, train_here
from safetensors import safe_open

from ft.durable import write_manifest
from ft.errors import UserError
from ft.verify import weights_difference

CONFIG = {
    "num_train_epochs": 9, "max_train_steps": 24, "learning_rate": 5e-3, "warmup_ratio": 0.1,
    "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "steps", "save_steps": 6,
    "save_total_limit": 50, "eval_strategy": "steps", "eval_steps": 5,
}  # fmt: skip
RUNS = {
    "as it is": {"per_device_train_batch_size": 16},  # on two processes: an update in one piece
    # Six updates of 31 rows, then one of a single row, of which the other process gets none.
    "batch 31": {"global_batch_size": 31, "max_train_samples": 187, "per_device_train_batch_size": 5},
    "weights": {
        "layerwise_lr_decay": 0.7, "head_learning_rate": 1e-2, "freeze": "embeddings", "ema_decay": 0.9,
        "gradient_checkpointing": "true",
    },
    "lora": {"lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 2e-2, "ema_decay": 0.9},
    # Here the worst is the best: not the last step.
    "scores": {"learning_rate": 2e-2, "metric_for_best_model": "mse", "greater_is_better": "true"},
}  # fmt: skip
LAUNCH = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.fixture
def fsdp(monkeypatch):
    """What `accelerate launch` sets for the processes."""
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def config(tiny_model, reviews):
    return {"model_name_or_path": tiny_model, "dataset_name": reviews, **CONFIG}


@pytest.fixture(scope="module", params=RUNS)
def words(request, config, kinds):
    data = {"dataset_name": kinds / request.param} if request.param == "scores" else {}
    return config | data | RUNS[request.param]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """One process, the whole update as one batch."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(**{**words, "per_device_train_batch_size": 32}, output_dir=output) == 0
    losses = series(output, "train/loss").values()
    assert max(losses) - min(losses) > 0.02  # it changes: the comparisons are meaningful
    return output


@pytest.fixture(scope="module")
def micro(words):
    """The same flags, with updates in micro-batches."""
    return {"per_device_train_batch_size": 8} | words


@pytest.fixture(scope="module")
def sharded(micro, tmp_path_factory):
    """Two processes, each with a shard, and their output."""
    output = tmp_path_factory.mktemp("sharded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCH.items():
            patch.setenv(name, value)
        done = launch(FORKS, flags(**micro, output_dir=output))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def assert_same(one, other):
    """Up to rounding, which affects metrics near 0 and the order of rows with nearly the same score a bit
    more."""
    for key, difference in largest_difference(one, other).items():
        if key.startswith(("train/", "eval/loss")):
            assert difference <= 1e-5, key
        else:
            assert difference <= (1e-4 if key == "weights" else 1e-3 if key.startswith("eval/") else 0), key


def tensors_of(checkpoint):
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def test_shards_on_two_processes_give_what_one_process_gives(whole, sharded):
    output, said = sharded
    assert "in shards on the processes (FSDP2)" in said
    assert_same(whole, output)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, output))
    assert one["best/step"] == two["best/step"] < 24  # best/ was reloaded for the test rows
    assert two["test/loss"] == pytest.approx(one["test/loss"], rel=1e-5)


@pytest.mark.parametrize("words", ["as it is", "lora"], indirect=True)
def test_a_checkpoint_goes_on_in_shards_or_whole(micro, whole, sharded, tmp_path, fsdp, monkeypatch):
    """Whatever wrote it; and shards continue from their own to the bit."""
    output, _ = sharded
    name = "step-00000012"
    one, two = (tensors_of(run / "checkpoints" / name) for run in (whole, output))
    assert one == two

    def go_on(run, launcher, place):
        checkpoint = {"output_dir": tmp_path / place, "resume_from_checkpoint": run / "checkpoints" / name}
        if launcher is None:
            assert train_here(**micro, **checkpoint) == 0
        else:
            done = launch(launcher, flags(**micro, **checkpoint))
            assert done.returncode == 0, done.stderr
        return tmp_path / place / "final"

    assert same_bits(output / "final", go_on(output, FORKS, "sharded, sharded"))
    after_whole = go_on(whole, FORKS, "whole, sharded")
    for variable in LAUNCH:
        monkeypatch.delenv(variable)
    after_sharded = go_on(output, None, "sharded, whole")
    for place in (after_whole, after_sharded):
        assert weights_difference(whole / "final", place, but=KEYS_BIAS) < 1e-4


def test_each_process_holds_half_of_the_weights_and_of_the_moments(config, tmp_path, fsdp):
    words = config | {"max_train_steps": 2, "save_strategy": "no", "output_dir": tmp_path / "run"}
    done = launch(FORKS, flags(**words), script="tests/shards.py")
    assert done.returncode == 0, done.stderr
    held = [json.loads((tmp_path / f"run/held-{rank}.json").read_text()) for rank in range(2)]
    for kind in ("weights", "moments"):
        assert sum(process[kind] for process in held) == held[0]["of the model"]
        assert max(process[kind] for process in held) < 0.55 * held[0]["of the model"]
    layers = {f"bert.encoder.layer.{number}" for number in range(2)}
    assert layers < set(held[0]["cut"])  # so one layer at a time is whole, including the narrowed last one


def test_in_bf16_autocast_does_what_it_does_on_one_process(config, tmp_path, fsdp, monkeypatch):
    words = config | {"max_train_steps": 6, "save_strategy": "no"}
    assert train_here(**words, output_dir=tmp_path / "fp32") == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    done = launch(FORKS, flags(**words, output_dir=tmp_path / "two"))
    assert done.returncode == 0 and "bf16 mixed precision" in done.stdout, done.stderr
    assert train_here(**words, output_dir=tmp_path / "one") == 0
    apart, from_fp32 = (
        largest_difference(tmp_path / name, tmp_path / "two")["train/loss"] for name in ("one", "fp32")
    )
    assert 3 * apart < from_fp32  # 1e-5 and 1e-4: the effect of bf16 is the same, not only small
    with safe_open(tmp_path / "two/final/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}


def test_a_run_in_shards_is_checked_before_and_stopped_and_taken_up(config, tmp_path, fsdp):
    words = config | {"output_dir": tmp_path / "run"}
    done = launch(FORKS, flags(**words, preflight="true"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/preflight.json").read_text())["fit"]
    done = launch(FORKS, flags(**words, max_time="1s"))
    assert done.returncode != 0 and "a checkpoint is saved" in done.stdout
    done = launch(FORKS, flags(**words, resume_from_checkpoint="latest"))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout


def test_a_run_stopped_in_an_evaluation_goes_on_in_shards(config, tmp_path, fsdp):
    """It evaluates first: what FSDP2 creates then must be usable in training."""
    words = config | {"max_train_steps": 10, "output_dir": tmp_path / "run"}
    assert launch(FORKS, flags(**words)).returncode == 0
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000010")
    state = tmp_path / "cut/checkpoints/step-00000006/state.json"
    about = json.loads(state.read_text())
    about["progress"]["evaluation_due"] = True
    state.write_text(json.dumps(about))
    (state.parent / "manifest.json").unlink()
    write_manifest(state.parent)
    done = launch(FORKS, flags(**words | {"output_dir": tmp_path / "cut"}, resume_from_checkpoint="latest"))
    assert done.returncode == 0, done.stderr
    assert same_bits(tmp_path / "run/final", tmp_path / "cut/final")


def test_accelerate_launch_cuts_the_model_as_the_launch_config_says(config, tmp_path):
    """The one in accelerate_configs/, on CPUs."""
    text = (ROOT / "accelerate_configs/multi_gpu_fsdp2.yaml").read_text()
    on_cpus = {**yaml.safe_load(text), "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(on_cpus))
    words = config | {"max_train_steps": 2, "save_strategy": "no", "output_dir": tmp_path / "run"}
    command = [*ACCELERATE, "--config_file", str(tmp_path / "launch.yaml")]
    done = launch(command, flags(**words))
    assert done.returncode == 0, done.stderr
    assert "in shards on the processes (FSDP2)" in done.stdout


WRONG = {
    "fsdp_version": {"FSDP_VERSION": "1"},
    "fsdp_cpu_ram_efficient_loading": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp_offload_params": {"FSDP_OFFLOAD_PARAMS": "true"},
    "fsdp_activation_checkpointing": {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "fsdp_auto_wrap_policy": {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"},
    "mixed_precision": {"ACCELERATE_MIXED_PRECISION": "fp16"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_change_a_result_or_a_file_is_refused(config, tmp_path, fsdp, monkeypatch, name):
    for variable, value in WRONG[name].items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"the launch asks for {name}: .*multi_gpu_fsdp2.yaml"):
        train_here(**config, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_layer_that_the_model_does_not_have_is_one_message(config, tmp_path, fsdp, monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "FooLayer")
    done = launch(FORKS, flags(**config, output_dir=tmp_path / "run"))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "fsdp_transformer_layer_cls_to_wrap: Could not find" in done.stderr and "FooLayer" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_with_one_tensor_in_several_places_is_refused(config, tokenizer, tmp_path, fsdp):
    from transformers import BartConfig, BartModel

    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    BartModel(BartConfig(**sizes, **heads, pad_token_id=0)).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    words = config | {"model_name_or_path": tmp_path / "bart", "output_dir": tmp_path / "run"}
    done = launch(FORKS, flags(**words))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "BartForSequenceClassification has a tensor in several places (model.shared" in done.stderr
    assert not (tmp_path / "run").exists()


def test_eval_py_is_launched_without_shards(config, tmp_path, fsdp):
    with pytest.raises(UserError, match=r"eval\.py has the whole model in each process"):
        score_here(model_name_or_path=config["model_name_or_path"], test_file=tmp_path / "no.csv")
