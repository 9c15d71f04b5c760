"""Row-keyed dropout: masks are a pure function of (seed, update, layer, row, position, unit)."""

import numpy as np
import pytest
import torch
from torch import nn

from ft.attention import attend, install_attention, install_masks
from ft.dropout import ROWLESS, RowKeyedDropout, RowKeys
from ft.invariance import key_dropout
from ft.last_layer import narrow_last_layer
from ft.layers import compile_layers

P = 0.1


def mask(rows, shape=(64, 128), update=0, layer=0, seed=42, p=P):
    keys = RowKeys(seed)
    place = keys.place(layer)
    keys.set(update, torch.as_tensor(rows))
    return keys.mask(place, (len(rows), *shape), round(p * 2**32) - 2**31)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_kept_elements_is_one_minus_p(p):
    kept = mask(range(200), p=p).float().mean(dim=(1, 2))
    spread = (p * (1 - p) / (64 * 128)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * spread / 200**0.5
    assert kept.std() < 1.3 * spread  # as even over the rows as independent draws


def correlation(a, b):
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: mask(range(1, 101)), id="rows"),
        pytest.param(lambda: mask(range(100), layer=1), id="layers"),
        pytest.param(lambda: mask(range(100), update=1), id="updates"),
        pytest.param(lambda: mask(range(100), seed=43), id="seeds"),
        pytest.param(lambda: mask(range(100), shape=(65, 128))[:, 1:], id="positions"),
        pytest.param(lambda: mask(range(100), shape=(64, 129))[:, :, 1:], id="units"),
        pytest.param(
            lambda: torch.rand(100, 64, 128, generator=torch.Generator().manual_seed(0)) > P,
            id="independent draws",
        ),
    ],
)
def test_masks_are_as_unrelated_as_independent_draws(other):
    assert abs(correlation(mask(range(100)), other())) < 4 / (100 * 64 * 128) ** 0.5


def test_no_two_of_many_rows_are_related():
    flat = mask(range(300), shape=(40, 64)).flatten(1).numpy().astype(np.float32)
    related = np.corrcoef(flat) - np.eye(300)
    # Among 44,850 pairs of independent rows of 2,560 elements, the largest correlation is about 0.09.
    assert np.abs(related).max() < 0.13
    assert abs(related.std() * 2560**0.5 - 1) < 0.05


def test_the_mask_of_a_row_does_not_depend_on_its_company_its_place_or_the_padding():
    rows = [7, 3, 12, 9]
    alone = {row: mask([row], shape=(5, 8))[0] for row in rows}
    for order in (rows, rows[::-1], [12, 7]):
        together = mask(order, shape=(9, 8))
        for place, row in enumerate(order):
            assert torch.equal(together[place, :5], alone[row])


def test_a_longer_batch_after_a_shorter_one_gives_the_same_masks():
    keys, threshold = RowKeys(42), round(P * 2**32) - 2**31
    place = keys.place(5)
    keys.set(3, torch.arange(4))
    short = keys.mask(place, (4, 6, 8), threshold)
    keys.set(3, torch.arange(4))
    long = keys.mask(place, (4, 30, 8), threshold)
    fresh = mask(range(4), shape=(30, 8), update=3, layer=5)
    assert torch.equal(long[:, :6], short) and torch.equal(long, fresh)


def test_the_pinned_bits():
    """Integer arithmetic: the same on any device and version. A change here changes every trajectory."""
    bits = mask([0, 1, 10**6], shape=(2, 16), update=7, layer=3, p=0.5).flatten(1).int().tolist()
    assert ["".join(map(str, row)) for row in bits] == PINNED


PINNED = [
    "11111000101000000000111100000010",
    "01100110011101001010000010011110",
    "11000010010011101001100100101110",
]


def test_the_expectation_of_the_output_is_the_input():
    keys = RowKeys(0)
    drop = RowKeyedDropout(0.3, 0, keys).train()
    x = torch.rand(8, 4, 16) + 0.5
    total = torch.zeros_like(x)
    for update in range(3000):
        keys.set(update, torch.arange(8))
        total += drop(x)
    assert torch.allclose(total / 3000, x, rtol=0.1)


def test_kept_elements_are_scaled_dropped_ones_are_zero_and_gradients_follow():
    keys = RowKeys(0)
    drop = RowKeyedDropout(0.25, 0, keys).train()
    keys.set(0, torch.arange(5))
    x = torch.randn(5, 7, 3, requires_grad=True)
    y = drop(x)
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / 0.75)
    y.sum().backward()
    assert torch.allclose(x.grad, kept.float() / 0.75)


def test_evaluation_and_p_zero_change_nothing():
    x = torch.randn(2, 3)
    assert RowKeyedDropout(0.5, 0, RowKeys(0)).eval()(x) is x
    assert RowKeyedDropout(0.0, 0, RowKeys(0)).train()(x) is x


# --- in a model


@pytest.fixture
def model(tiny_model):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)


def gradients(model, keys, ids, mask, rows, pieces):
    model.zero_grad()
    model.train()
    for part in np.array_split(np.arange(len(rows)), pieces):
        longest = int(mask[part].sum(dim=1).max())
        keys.set(0, rows[part])
        logits = model(input_ids=ids[part, :longest], attention_mask=mask[part, :longest]).logits
        nn.functional.cross_entropy(
            logits, torch.zeros(len(part), dtype=torch.long), reduction="sum"
        ).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_do_not_depend_on_how_the_rows_are_cut(model):
    keys, unkeyed = key_dropout(model, "row_keyed", 42)
    assert unkeyed == []
    lengths = torch.randint(3, 20, (32,))
    mask = (torch.arange(20) < lengths[:, None]).long()
    ids = torch.randint(4, 30, (32, 20)) * mask
    rows = torch.randperm(1000)[:32]
    one = gradients(model, keys, ids, mask, rows, 1)
    eight = gradients(model, keys, ids, mask, rows, 8)
    assert (one - eight).norm() / one.norm() < 2e-6
    keys.seed = 43  # the masks matter at all:
    assert (one - gradients(model, keys, ids, mask, rows, 1)).norm() / one.norm() > 0.05


def small(kind, **options):
    """A random sequence classifier of two small layers with dropout 0.1, of a family other than BERT."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "num_labels": 3, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes | options)
    return AutoModelForSequenceClassification.from_config(config)


def batch():
    torch.manual_seed(1)
    lengths = torch.randint(3, 20, (32,))
    mask = (torch.arange(20) < lengths[:, None]).long()
    return torch.randint(4, 30, (32, 20)) * mask, mask, torch.randperm(1000)[:32]


def test_dropout_on_a_tensor_that_all_rows_share_is_the_same_for_every_cut():
    """DeBERTa drops units of its distance embeddings, which have no rows: one mask per update in every
    layer."""
    model = small(
        "deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
    )
    keys, unkeyed = key_dropout(model, "row_keyed", 42)
    assert unkeyed == []
    assert [place.axes for place in keys.places if ROWLESS in place.axes.values()] == [{0: ROWLESS}] * 2
    one, eight = (gradients(model, keys, *batch(), pieces) for pieces in (1, 8))
    assert (one - eight).norm() / one.norm() < 2e-6


def test_every_dropout_of_the_model_is_replaced_and_evaluation_is_unchanged(model):
    ids = torch.randint(4, 30, (4, 9))
    before = model.eval()(input_ids=ids).logits
    key_dropout(model, "row_keyed", 42)
    assert not any(type(m) is nn.Dropout for name, m in model.named_modules() if "attention.self" not in name)
    assert torch.allclose(before, model.eval()(input_ids=ids).logits, atol=1e-6)


def test_attention_with_dropout_off_equals_transformers_own(model):
    ids = torch.randint(4, 30, (4, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 7, 1])[:, None]).long()
    plain = model.eval()(input_ids=ids, attention_mask=mask).logits
    keys = RowKeys(0)
    install_masks(model)
    install_attention(model, keys)
    keys.set(0, torch.arange(4))
    assert model.config._attn_implementation == "row_keyed"
    kept = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(plain, kept, atol=1e-6)
    # The explicit form itself, with dropout too small to drop anything:
    query, key, value = torch.randn(3, 4, 2, 9, 16).unbind()
    module = model.bert.encoder.layer[0].attention.self
    tiny, _ = attend(module, query, key, value, mask[:, None, None].bool(), dropout=1e-12, scaling=0.25)
    none, _ = attend(module, query, key, value, mask[:, None, None].bool(), dropout=0.0, scaling=0.25)
    assert torch.allclose(tiny, none, atol=1e-6)


@pytest.mark.parametrize("mode", ["row_keyed", "torch"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])  # sdpa attention, and its own ("eager")
def test_no_mask_of_a_training_pass_has_the_host_wait_for_a_device(kind, mode, monkeypatch):
    """Tensors on the meta device have no values, so reading one is an error."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import create_bidirectional_mask, eager_mask, sdpa_mask

    for name, theirs in (("eager", eager_mask), ("sdpa", sdpa_mask)):  # not those of an earlier model
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, theirs)
    model = small(kind)
    key_dropout(model, mode, 42)
    states, ones = torch.ones(2, 5, 16, device="meta"), torch.ones(2, 5, dtype=torch.long, device="meta")
    assert create_bidirectional_mask(model.config, states, ones).shape == (2, 1, 5, 5)
    assert create_bidirectional_mask(model.config, states, None) is None  # nothing is padded
    with torch.no_grad(), pytest.raises(RuntimeError):  # an evaluation may read, for a faster kernel
        create_bidirectional_mask(model.config, states, ones)
    if mode == "row_keyed":
        key_dropout(model, mode, 42, compiled_length=8)
        with torch.no_grad():  # a compiled model has a mask here, too: without one, it would be recompiled
            assert create_bidirectional_mask(model.config, states, ones).shape == (2, 1, 5, 5)


class Small(nn.Module):
    """A model that drops units of its embeddings (rows, tokens, units) in its own way."""

    def __init__(self, drop):
        super().__init__()
        self.embed, self.drop, self.how = nn.Embedding(40, 8), nn.Dropout(0.3), drop

    def forward(self, input_ids, attention_mask):
        x = self.how(self.drop, self.embed(input_ids))
        return (x * attention_mask[:, :, None]).sum(dim=1)


def test_dropout_is_keyed_wherever_the_rows_are():
    positions_first = Small(lambda drop, x: drop(x.transpose(0, 1)).transpose(0, 1))
    no_rows = Small(lambda drop, x: x * drop(torch.ones(8)))
    for model in (positions_first, no_rows):
        assert key_dropout(model, "row_keyed", 0)[1] == []


def test_what_cannot_be_keyed_is_named():
    flat = Small(lambda drop, x: drop(x.flatten(0, 1)).view(x.shape))
    _, unkeyed = key_dropout(flat, "row_keyed", 0)
    assert unkeyed == ["the input of the dropout in drop has no row dimension"]
    functional = Small(lambda drop, x: nn.functional.dropout(x, 0.1))
    _, unkeyed = key_dropout(functional, "row_keyed", 0)
    assert len(unkeyed) == 1 and "random numbers are drawn" in unkeyed[0]
    neighbours = Small(lambda drop, x: drop(x) - x.mean(dim=0))
    _, unkeyed = key_dropout(neighbours, "row_keyed", 0)
    assert len(unkeyed) == 1 and "the rows beside it" in unkeyed[0]


def test_a_layer_that_is_used_again_in_a_pass_drops_others_and_the_next_pass_the_same():
    keys, threshold = RowKeys(42), round(P * 2**32) - 2**31
    place, passes = keys.place(3), []
    for _ in range(2):
        keys.set(0, torch.arange(100))
        passes.append([keys.mask(place, (100, 64, 128), threshold) for _ in range(2)])
    assert torch.equal(passes[0][0], passes[1][0]) and torch.equal(passes[0][1], passes[1][1])
    assert torch.equal(passes[0][0], mask(range(100), layer=3))
    assert abs(correlation(*passes[0])) < 4 / (100 * 64 * 128) ** 0.5


def test_a_compiled_layer_is_compiled_once_and_drops_the_same(monkeypatch):
    """Once for all updates, batch sizes and lengths, and all layers except the last, which has a program of
    its own: what changes must be a tensor, not a constant. (Transformers' mask is a view of another tensor at
    some sizes, and then a layer is compiled once more.)"""
    programs = []

    def compiler(graph, inputs):
        programs.append(graph)
        return graph.forward

    def compiled(layer, **options):
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend=compiler, **options)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    sides = []
    for longest in (None, 32):
        model = small("electra", num_hidden_layers=4)
        assert narrow_last_layer(model) == []
        keys, unkeyed = key_dropout(model, "row_keyed", 42, longest)
        assert unkeyed == []
        if longest:
            compile_layers(model)
        sides.append((model.train(), keys))
    for update, (rows, length) in enumerate([(8, 20), (8, 32), (5, 9), (3, 31), (8, 20)]):
        ids, found = torch.randint(4, 30, (rows, length)), []
        mask = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
        inputs = {"input_ids": ids} | ({"attention_mask": mask} if update != 1 else {})
        for model, keys in sides:
            model.zero_grad()
            keys.set(update, torch.arange(rows) + update)
            model(**inputs).logits.sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (found[0] - found[1]).norm() / found[0].norm() < 2e-6
    assert 2 <= len(programs) <= 3  # one for each of four layers would be more


def test_the_keys_follow_the_rows_to_another_device_also_where_nothing_reads_them():
    for mode in ("torch", "row_keyed"):
        keys = key_dropout(small("electra"), mode, 42)[0]
        keys.set(0, torch.arange(3, device="meta"))
        assert keys.keys.device.type == "meta"


def test_dropout_mode_torch_leaves_the_model_alone_and_says_so(model):
    _, unkeyed = key_dropout(model, "torch", 42)
    assert any(type(m) is nn.Dropout for m in model.modules())
    assert "dropout_mode: torch" in unkeyed[0]
