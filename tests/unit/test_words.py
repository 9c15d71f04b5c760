"""A model that trains only the word embeddings of the data's tokens learns and exports the same as one that
trains the whole table; or it has the whole table."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForSequenceClassification

from ft.config import Config
from ft.ema import averaged
from ft.invariance import key_dropout
from ft.lora import add_lora
from ft.optim import build_optimizer, clip_in_step
from ft.words import count_parameters, train_used_words, used_words, with_all_words

VOCABULARY, TOKENS = 60, range(4, 14)
PAD = 0
KINDS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "albert",
    "deberta-v2",
    "modernbert",
    "xlnet",
    "gpt2",
    "qwen2",
]


def small(kind="bert", **options):
    """A random sequence classifier of two small layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
        "qwen2": sizes | {"num_key_value_heads": 2},
        "electra": sizes | {"embedding_size": 16},
    }.get(kind, sizes)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, num_labels=3, **sizes, **options)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, 1, 2
    return AutoModelForSequenceClassification.from_config(config)


def narrow(model, tokens=TOKENS):
    """`train_used_words` for data with these tokens."""
    alone = SimpleNamespace(is_main=True, check_same=lambda _: None)
    train_used_words(model, SimpleNamespace(pad_token_id=PAD), np.array(tokens), alone)
    return model


def train(model, updates=4, **options):
    """A model and its optimizer after some updates on rows of `TOKENS`, with the norms of the gradients."""
    Accelerator(cpu=True)  # the wrapper needs its state
    # A large epsilon, because of gradients that are only rounding, such as those of keys' biases.
    config = Config(learning_rate=1e-2, adam_epsilon=1e-4, **{"weight_decay": 0.1, **options})
    optimizer = AcceleratedOptimizer(build_optimizer(model, config), device_placement=False)
    keys, _ = key_dropout(model.train(), "row_keyed", 42)
    generator, norms = torch.Generator().manual_seed(1), []
    for update in range(updates):
        lengths = torch.randint(3, 9, (16, 1), generator=generator)
        mask = (torch.arange(8) < lengths).long()
        ids = torch.randint(TOKENS.start, TOKENS.stop, mask.shape, generator=generator) * mask
        keys.set(update, torch.arange(16))
        logits = model(input_ids=ids, attention_mask=mask).logits
        nn.functional.cross_entropy(logits, torch.arange(16) % 3).backward()
        norms.append(float(clip_in_step(optimizer, model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, norms


def exported(model):
    return {name: value.clone() for name, value in with_all_words(model, model.state_dict()).items()}


def assert_near(found, expected, within):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=within, atol=within, msg=lambda said, n=name: f"{n}: {said}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_exports_what_the_whole_table_gives(kind):
    whole = small(kind)
    narrowed = narrow(copy.deepcopy(whole))
    ((name, words),) = used_words(narrowed).items()
    assert set(words.tokens.tolist()) >= {*TOKENS, PAD} and len(words.weight) < VOCABULARY / 2
    before = exported(narrowed)
    assert_near(before, whole.state_dict(), within=0)
    (_, norms), (_, narrow_norms) = train(whole), train(narrowed)
    assert narrow_norms == pytest.approx(norms, rel=1e-5)
    assert_near(exported(narrowed), whole.state_dict(), within=1e-5)
    # Weight decay has changed the words that no row has.
    assert (exported(narrowed)[name][50:] / before[name][50:] - 0.999**4).abs().max() < 1e-5


def test_without_weight_decay_the_other_words_stay_as_they_are_to_the_last_bit():
    model = narrow(small())
    before = exported(model)
    train(model, weight_decay=0.0)
    (name,) = used_words(model)
    after = exported(model)[name]
    assert torch.equal(after[50:], before[name][50:]) and not torch.equal(after[5], before[name][5])


def test_an_average_of_the_weights_is_that_of_whole_tables():
    whole = small()
    narrowed = narrow(copy.deepcopy(whole))
    found = []
    for model in (whole, narrowed):
        optimizer, _ = train(model, ema_decay=0.5, weight_decay=0.9)
        with averaged(optimizer):
            found.append(exported(model))
    assert_near(found[1], found[0], within=1e-5)
    assert not torch.allclose(
        found[1]["bert.embeddings.word_embeddings.weight"],
        exported(narrowed)["bert.embeddings.word_embeddings.weight"],
        rtol=1e-3,
    )


def test_the_parameters_are_counted_with_all_words():
    whole = small()
    total = sum(weight.numel() for weight in whole.parameters())
    whole.bert.pooler.requires_grad_(False)
    trained = sum(weight.numel() for weight in whole.parameters() if weight.requires_grad)
    assert count_parameters(whole) == (total, trained)
    ((_, words),) = used_words(narrow(whole)).items()
    assert count_parameters(whole) == (total, trained - 32 * (VOCABULARY - len(words.tokens)))


def test_a_token_that_no_row_has_is_an_error():
    model = narrow(small())
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5, 50]]))


def test_padding_has_no_gradient_where_it_had_none():
    model = narrow(small())
    (words,) = used_words(model).values()
    model(input_ids=torch.tensor([[5, PAD]])).logits.sum().backward()
    rows = words.weight.grad.abs().sum(1)
    assert rows[words.places[PAD]] == 0 and rows[words.places[5]] > 0
    assert (rows > 0).sum() == 1


class ReadsTheTable(BertForSequenceClassification):
    """A custom head that finds a word by its place in the table."""

    def forward(self, input_ids, **options):
        given = super().forward(input_ids, **options)
        table = self.get_input_embeddings().weight
        return SimpleNamespace(logits=given.logits + table[input_ids[:, 0] - 29].sum(-1, keepdim=True))


class HoldsTheTable(BertForSequenceClassification):
    """A custom model that finds its words by another way than the module's name."""

    def __init__(self, config):
        super().__init__(config)
        self.held = [self.bert.embeddings.word_embeddings]

    def forward(self, input_ids, **options):
        return super().forward(inputs_embeds=self.held[0](input_ids), **options)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


def of_class(kind):
    return kind(small().config)


def frozen():
    model = small()
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def with_table(**options):
    model = small()
    model.bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY, 32, **options)
    return model


def scaled():
    model = small()
    model.bert.embeddings.word_embeddings = Scaled(VOCABULARY, 32)
    return model


def tied():
    model = small()
    model.classifier = nn.Linear(32, VOCABULARY)
    model.classifier.weight = model.get_input_embeddings().weight
    return model


def with_lora():
    model = small()
    add_lora(model, Config(model_name_or_path="-", lora_rank=2), "text-classification", "-", set())
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: of_class(ReadsTheTable), lambda: of_class(HoldsTheTable), frozen, scaled, tied, with_lora,
        lambda: with_table(max_norm=1.0), lambda: with_table(scale_grad_by_freq=True),
        lambda: with_table(sparse=True),
    ],
    ids=["read", "held", "frozen", "subclass", "tied", "lora", "max_norm", "by_freq", "sparse"],
)  # fmt: skip
def test_it_stays_whole_where_a_part_would_not_do(build):
    model = build()
    table, mode = model.get_input_embeddings(), model.training
    assert not used_words(narrow(model))
    assert model.get_input_embeddings() is table and model.training == mode


def test_it_stays_whole_where_the_data_has_every_token():
    assert not used_words(narrow(small(), range(VOCABULARY)))
    assert not used_words(narrow(small(), range(VOCABULARY - 1))), (
        "one row is saved, and one of ones is added"
    )
    assert used_words(narrow(small(), range(VOCABULARY - 2)))


def test_a_token_that_the_table_lacks_is_left_to_another_check():
    assert used_words(narrow(small(), [5, VOCABULARY + 3]))


class Unregistered(nn.Module):
    """A custom model whose table is not one of its modules."""

    def __init__(self):
        super().__init__()
        self.config, self.held, self.head = small().config, [nn.Embedding(VOCABULARY, 4)], nn.Linear(4, 3)

    def get_input_embeddings(self):
        return self.held[0]


def test_a_table_that_is_no_module_is_left_alone():
    assert not used_words(narrow(Unregistered()))
