"""Loading models and tokenizers: config overrides, weights that fit, and the maximum text length."""

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from ft.config import Config, EvalConfig
from ft.data.encode import EncodedRows
from ft.data.loader import RowDataset, Slot
from ft.errors import UserError
from ft.model import build_model, check_tokens, embedded_tokens
from ft.pretrained import apply_overrides, load_model_config, load_tokenizer, longest_text
from ft.resume import weights_mark
from ft.tasks.text_classification import TextClassification
from ft.tasks.text_classification.kind import settle_head

STATE = {"problem_type": "single_label_classification", "label_names": ["bad", "fine", "good"]}


def built(path, notes=None, config_class=Config, state=STATE, **options):
    config = config_class(model_name_or_path=str(path), **options)
    task = TextClassification()
    task.load_state(state)
    model_config = load_model_config(config)
    tokenizer = load_tokenizer(config, model_config)
    return build_model(config, task, model_config, tokenizer, [] if notes is None else notes)


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# --- config_overrides


@pytest.fixture
def bert():
    from transformers import BertConfig

    return BertConfig()


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("hidden_dropout_prob=0", "hidden_dropout_prob", 0.0),
        (" hidden_dropout_prob = 0.5 , num_hidden_layers=3,", "num_hidden_layers", 3),
        ("classifier_dropout=0.25", "classifier_dropout", 0.25),  # None in the config
        ("hidden_act=relu", "hidden_act", "relu"),
        ("is_decoder=True", "is_decoder", True),
        ("", "hidden_dropout_prob", 0.1),
    ],
)
def test_an_override_takes_the_type_of_what_it_changes(bert, text, name, value):
    apply_overrides(bert, text)
    assert getattr(bert, name) == value and type(getattr(bert, name)) is type(value)


def test_a_fraction_may_take_the_place_of_a_whole_number_where_the_model_allows_one():
    """A model without dropout (ALBERT) has 0 in its config.json."""
    from transformers import BertConfig

    config = BertConfig(hidden_dropout_prob=0)
    apply_overrides(config, "hidden_dropout_prob=0.1")
    assert config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize(
    "text, said",
    [
        ("hidden_droput_prob=0", "did you mean 'hidden_dropout_prob'"),
        ("hidden_dropout_prob", "expected name=value pairs"),
        ("hidden_dropout_prob=no", "'hidden_dropout_prob=no' is wrong"),
        ("hidden_dropout_prob=nan", "finite"),
        ("num_hidden_layers=1.5", "'num_hidden_layers=1.5' is wrong"),
        ("is_decoder=maybe", "true or false"),
        ("num_labels=7", "'num_labels' is decided by the data"),
        ("dtype=float16", "'dtype' is decided by the launch"),
        ("return_dict=false", "'return_dict' is decided by the loop"),
    ],
)
def test_an_override_that_cannot_be_is_named(bert, text, said):
    with pytest.raises(UserError, match="config_overrides: ") as refused:
        apply_overrides(bert, text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "hidden_dropout_prob=2",
        "num_attention_heads=5",
        "hidden_act=foo",
        "initializer_range=-1",
        "intermediate_size=48",
        "max_position_embeddings=8",
        "vocab_size=100",
    ],
)
def test_a_model_that_cannot_be_built_with_an_override_blames_the_override(tiny_model, text):
    with pytest.raises(UserError, match=r"^config_overrides: "):
        built(tiny_model, config_overrides=text)


# --- model and tokenizer of different origin


@pytest.mark.parametrize(
    ("kind", "options", "padding"),
    [
        ("llama", {"pad_token_id": 7}, 0),  # its head reads the last token that is not padding
        ("llama", {"pad_token_id": -1}, 0),
        ("qwen3_5", {}, 0),  # in the config of its text part
        ("roberta", {"pad_token_id": 1}, 1),  # counts positions from it
    ],
)
def test_the_model_takes_for_padding_what_the_tokenizer_pads_with(tiny_model, kind, options, padding):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **options)
    tokenizer = load_tokenizer(Config(model_name_or_path=str(tiny_model)), config)
    assert tokenizer.pad_token_id == 0 and config.get_text_config().pad_token_id == padding


def test_a_model_without_token_types_gets_none(tiny_model):
    """Some RoBERTas have the tokenizer of BERT."""
    from transformers import AutoConfig

    for types, names in ((1, {"input_ids", "attention_mask"}), (2, None)):
        config = AutoConfig.for_model("roberta", type_vocab_size=types)
        found = load_tokenizer(Config(model_name_or_path=str(tiny_model)), config).model_input_names
        assert set(found) == (names or {"input_ids", "token_type_ids", "attention_mask"})
    config = AutoConfig.for_model("gpt2")  # adds the embedding of the token with that number
    found = load_tokenizer(Config(model_name_or_path=str(tiny_model)), config).model_input_names
    assert set(found) == {"input_ids", "attention_mask"}


def test_xlnet_which_reads_the_last_place_gives_a_row_the_same_in_any_batch(tiny_model):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "num_labels": 3}
    config = AutoConfig.for_model("xlnet", **sizes)
    tokenizer = load_tokenizer(Config(model_name_or_path=str(tiny_model)), config)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = [[2, 5, 6, 3], [2, 7, 8, 9, 10, 11, 3]]
    table = pa.table({"input_ids": ids, "row": [0, 1], "full_length": [4, 7], "cut": [0, 0]})
    dataset = RowDataset(EncodedRows(table), tokenizer)
    with torch.inference_mode():
        together = model(**dataset.__getitems__(Slot(np.array([0, 1]), 0)).inputs).logits
        alone = [model(**dataset.__getitems__(Slot(np.array([row]), 0)).inputs).logits for row in (0, 1)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_that_names_no_token_pads_with_what_the_model_does_or_is_refused(folder):
    from tokenizers import Tokenizer
    from transformers import AutoConfig, PreTrainedTokenizerFast

    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    config = AutoConfig.for_model("modernbert", pad_token_id=4)
    found = load_tokenizer(Config(model_name_or_path=str(folder)), config)
    assert (found.pad_token_id, config.pad_token_id) == (4, 4)
    with pytest.raises(UserError, match="has no padding, end-of-text or unknown token"):
        load_tokenizer(Config(model_name_or_path=str(folder)), AutoConfig.for_model("gpt2"))


def test_files_that_their_libraries_refuse_in_types_of_their_own_are_one_message(folder, monkeypatch):
    from transformers import AutoTokenizer

    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"layer_norm_eps": "1e-12"}))
    with pytest.raises(UserError, match=r"model_name_or_path: .* cannot be loaded: .*layer_norm_eps"):
        built(folder)
    (folder / "config.json").write_text(json.dumps(content))
    newer = Mock(side_effect=Exception("data did not match any variant of untagged enum ModelWrapper"))
    with monkeypatch.context() as patched, pytest.raises(UserError, match="cannot be loaded: data did not"):
        patched.setattr(AutoTokenizer, "from_pretrained", newer)
        built(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"
    (folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(UserError, match=r"tokenizer\.json' is a Git LFS pointer"):
        built(folder)


def test_a_token_without_an_embedding_is_refused_where_a_text_holds_it(tiny_model, tokenizer):
    model = built(tiny_model)
    last = len(tokenizer) - 1
    added = load_tokenizer(Config(model_name_or_path=str(tiny_model)), model.config)
    added.add_tokens(["[USER]"])
    others = {"row": [0], "full_length": [3], "cut": [0]}
    rows = {n: EncodedRows(pa.table({"input_ids": [[2, n, 3]], **others})) for n in (last, last + 1)}
    check_tokens(model, added, {"train": rows[last]})
    with pytest.raises(UserError, match=r"test data: a text holds the token '\[USER\]', which was added"):
        check_tokens(model, added, {"train": rows[last], "test": rows[last + 1]})


def test_a_padding_token_without_an_embedding_is_refused(folder, tokenizer):
    from transformers import AutoTokenizer

    added = AutoTokenizer.from_pretrained(folder)
    added.add_special_tokens({"pad_token": "[NONE]"})
    added.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"padding token '\[NONE\]', number {len(tokenizer)}, was added"):
        built(folder)


def test_the_padding_token_is_the_tokenizers_to_say(tiny_model):
    with pytest.raises(UserError, match="'pad_token_id' is decided by the tokenizer"):
        built(tiny_model, config_overrides="pad_token_id=3")


def test_embeddings_that_are_no_table_count_no_tokens():
    from transformers import CanineConfig, CanineForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    assert embedded_tokens(CanineForSequenceClassification(CanineConfig(**small))) is None


@pytest.mark.parametrize(
    ("names", "order", "said"),
    [
        (["bad", "fine", "good"], [0, 1, 2], None),
        (["GOOD", "bad", "Fine"], [1, 2, 0], "in another order: its outputs were put in the data's"),
        (["a", "b", "c"], [0, 1, 2], "was trained for a, b, c and continues as bad, fine, good"),
        (
            ["fine", "a", "bad"],
            [2, 0, 1],
            "continues as bad, fine, good; 2 of them keep their outputs",
        ),
        (
            ["bad", "a", "good"],
            [0, 1, 2],
            "continues as bad, fine, good; 2 of them keep their outputs",
        ),
        (["bad", "good"], None, "the head is a new one: the model's own has other outputs (2, not 3)"),
    ],
)
def test_a_head_that_was_trained_before_has_its_outputs_in_the_order_of_the_labels(
    tiny_model, tmp_path, names, order, said
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=len(names), **options)
    trained.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    notes = []
    found = built(tmp_path, notes)
    if order is not None:
        assert torch.equal(found.classifier.weight, trained.classifier.weight[order])
        assert torch.equal(found.classifier.bias, trained.classifier.bias[order])
    assert [said in note for note in notes] == ([] if said is None else [True])


def test_where_labels_differ_by_case_alone_only_the_same_name_is_the_same_label(folder):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for theirs, ours, order in (
        ("good bad sad", "Good good bad", [2, 0, 1]),
        ("Yes yes no", "Yes maybe no", [0, 1, 2]),
        ("yes YES no", "Yes maybe no", [0, 1, 2]),
    ):
        before = model.classifier.weight.detach().clone()
        (note,) = settle_head(model, dict(enumerate(theirs.split())), ours.split(), set())
        assert f"continues as {', '.join(ours.split())}; " in note
        assert torch.equal(model.classifier.weight, before[order])


def test_a_classifiers_head_that_is_thrown_away_for_a_regression_is_said(folder):
    built(folder).save_pretrained(folder)
    notes, score = [], {"problem_type": "regression", "label_names": ["score"], "mean": 0.0, "std": 1.0}
    built(folder, notes, state=score)
    assert notes == ["the head is a new one: the model's own has other outputs (3, not 1)"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "pad_token_id": 0}),
        (
            "t5",
            {
                "d_model": 32,
                "d_kv": 16,
                "d_ff": 32,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
        ),
    ],
)
def test_no_keys_and_values_are_kept_for_a_next_token(tokenizer, tmp_path, kind, options):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), eos_token_id=3, **options)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    assert built(tmp_path)(**rows).past_key_values is None


# --- weights


def test_a_tokenizer_of_sentencepiece_alone_says_what_reads_it(tmp_path):
    """As in deberta-v3. Transformers asks for tiktoken instead, which cannot read it."""
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "spm.model").write_bytes(b"no such file")
    with pytest.raises(UserError, match=r"model_name_or_path: .*pip install sentencepiece protobuf"):
        load_tokenizer(Config(model_name_or_path=str(tmp_path)), None)


def test_a_pretrained_model_with_a_new_head_says_nothing(tiny_model):
    notes = []
    built(tiny_model, notes)
    assert notes == []


def test_weights_that_do_not_fit_the_config_of_their_folder_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"model_name_or_path: .*do not fit.*\[64\] there and \[48\]"):
        built(folder)


def test_weights_that_were_not_fetched_from_git_lfs(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(UserError, match=r"model\.safetensors' is a Git LFS pointer.*git lfs pull"):
        built(folder)


def test_weights_of_another_model_are_refused(folder):
    change_weights(folder, lambda weights: {f"other.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(UserError, match="none of the weights of a BertForSequenceClassification"):
        built(folder)


def test_weights_that_a_folder_lacks_are_counted_and_named(folder):
    change_weights(folder, lambda weights: {n: t for n, t in weights.items() if "pooler" not in n})
    notes = []
    built(folder, notes)
    assert len(notes) == 1 and "2 of 39" in notes[0] and "bert.pooler.dense.bias" in notes[0]


def test_drawn_weights_are_no_mark_of_the_pretrained_model(folder):
    """Hosts with different CPUs may draw different last bits."""
    change_weights(folder, lambda weights: {n: t for n, t in weights.items() if "pooler" not in n})
    marks, poolers = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = built(folder)
        marks.append(weights_mark(model))
        poolers.append(model.bert.pooler.dense.weight)
    assert marks[0] == marks[1] and not torch.equal(*poolers)
    change_weights(folder, lambda weights: {n: t + 0.01 for n, t in weights.items()})
    assert weights_mark(built(folder)) != marks[0]


def test_the_head_of_a_model_with_other_classes_is_made_anew(folder, tmp_path):
    model = built(folder)
    model.classifier = torch.nn.Linear(32, 7)
    model.config.num_labels = 7
    model.save_pretrained(folder)
    notes = []
    assert built(folder, notes).num_labels == 3
    assert notes == ["the head is a new one: the model's own has other outputs (7, not 3)"]


def test_an_evaluation_needs_a_model_that_was_trained_for_its_task(tiny_model, folder):
    with pytest.raises(UserError, match=r"lacks weights \(classifier\.bias \.\.\.\).*best"):
        built(tiny_model, config_class=EvalConfig)
    built(folder).save_pretrained(folder)
    assert built(folder, config_class=EvalConfig).num_labels == 3


def test_a_text_with_the_token_that_ends_texts_is_refused_with_its_row():
    rows = EncodedRows(pa.table({
        "input_ids": pa.array([[0, 5, 2], [0, 2, 6, 2], [0, 7, 8, 2]], pa.list_(pa.int32())),
        "full_length": [3, 4, 4], "cut": pa.array([0] * 3, pa.int8()), "row": [4, 9, 11],
    }))  # fmt: skip
    assert rows.times(2).tolist() == [1, 2, 1] and rows.part(1, 3).times(2).tolist() == [2, 1]
    config = SimpleNamespace(is_encoder_decoder=True, eos_token_id=2, model_type="t5")
    model = SimpleNamespace(config=config, get_input_embeddings=lambda: SimpleNamespace(num_embeddings=9))

    class Tokenizer:
        convert_ids_to_tokens = {2: "</s>"}.get

        def __len__(self):
            return 9

    with pytest.raises(UserError, match=r"test data: row 9: the text holds '</s>', which ends"):
        check_tokens(model, Tokenizer(), {"test": rows})
    config.is_encoder_decoder = False
    check_tokens(model, Tokenizer(), {"test": rows})


def test_bigbird_attends_to_whole_texts_from_the_beginning(tmp_path, folder):
    from transformers import BigBirdConfig, BigBirdForSequenceClassification

    config = BigBirdConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    assert config.attention_type == "block_sparse"
    BigBirdForSequenceClassification(config).save_pretrained(tmp_path / "bigbird")
    notes = []
    model = built(tmp_path / "bigbird", notes, tokenizer_name=str(folder))
    assert model.config.attention_type == "original_full" and "attends to whole texts" in notes[0]


def test_a_tokenizer_that_needs_a_package_says_which(folder, monkeypatch):
    from transformers import AutoTokenizer

    def needs(*_, **__):
        raise ModuleNotFoundError("You need to install fugashi to use MecabTokenizer.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs)
    config = Config(model_name_or_path=str(folder))
    with pytest.raises(UserError, match="cannot be loaded: You need to install fugashi"):
        load_tokenizer(config, load_model_config(config))


def test_a_run_in_the_place_of_its_model_is_told_where_its_best_is(folder, tmp_path):
    folder.rename(tmp_path / "best")
    with pytest.raises(UserError, match=r"no config\.json; did you mean '.*best'"):
        load_model_config(Config(model_name_or_path=str(tmp_path)))


def test_a_model_of_something_else_than_texts_is_refused(folder):
    from transformers import ViTConfig

    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    with pytest.raises(UserError, match=r"model_name_or_path: .*cannot be loaded"):
        built(folder)


# --- length


@pytest.mark.parametrize(
    "kind, options, limit",
    [
        ("bert", {"max_position_embeddings": 40}, 40),
        ("bert", {"max_position_embeddings": 400}, 64),  # the tokenizer's limit
        (
            "roberta",
            {"max_position_embeddings": 42, "pad_token_id": 1},
            40,
        ),  # positions 0 and 1 hold no token
        ("xlnet", {}, 64),  # no limit of its own
    ],
)
def test_the_longest_text_is_what_the_model_has_positions_for(tiny_model, kind, options, limit):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **options)
    tokenizer = load_tokenizer(Config(model_name_or_path=str(tiny_model)), config)
    assert longest_text(None, tokenizer, config) == limit
    with pytest.raises(UserError, match=f"max_length: found {limit + 1}, expected 3 to {limit}"):
        longest_text(limit + 1, tokenizer, config)


def test_the_longest_text_of_roberta_goes_through_it(tiny_model):
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    longest = longest_text(None, load_tokenizer(Config(model_name_or_path=str(tiny_model)), config), config)
    model = RobertaModel(config)
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_a_card_of_a_model_with_code_of_its_own_says_that_it_has_to_be_trusted():
    task = TextClassification()
    task.load_state({"problem_type": "single_label_classification", "label_names": ["a", "b"]})
    assert 'folder", trust_remote_code=True)' in task.card_usage(True)
    assert "trust_remote_code" not in task.card_usage()
