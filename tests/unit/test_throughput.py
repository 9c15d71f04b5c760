"""Rates, padding and the wait for data are of the whole launch; each process's share is reported, too."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ft import throughput
from ft.data.loader import PlanSampler, RowDataset, updates
from ft.throughput import Throughput

LENGTHS = np.array([3, 9, 4, 4, 7, 2, 5, 5, 6, 1, 8], np.int32)


class Rows:
    """Encoded rows of these lengths, as much as a data set needs."""

    lengths, labels, pieces = LENGTHS, None, None

    def __len__(self):
        return len(LENGTHS)

    def padded(self, rows, pad_id, multiple, on_left):
        tokens = np.zeros((len(rows), LENGTHS[rows].max()), np.int64)
        return {"input_ids": tokens, "attention_mask": tokens}


def sampler_of(processes, micro_batch_size=None):
    dataset = RowDataset(Rows(), SimpleNamespace(pad_token_id=0, padding_side="right"))
    return PlanSampler(dataset, 4, 1, processes, micro_batch_size)


def batches_of(sampler, rank):
    """The micro-batches of one process, grouped by update, as sharded by Accelerate."""
    slots = itertools.islice(sampler, rank, None, sampler.num_processes)
    return updates(map(sampler.dataset.__getitems__, slots))


def log_of_an_epoch(monkeypatch, seconds, waits):
    """The log after one epoch on processes that took these seconds and waited these for each update."""
    meters, numbers = [], []
    for rank, (taken, wait) in enumerate(zip(seconds, waits, strict=True)):
        sampler = sampler_of(len(seconds))
        meter = Throughput(sampler, 0, SimpleNamespace(seconds=lambda taken=taken: taken))
        times = itertools.accumulate(itertools.cycle([1.0, wait]))  # a second passes between two waits
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda times=times: next(times)))
        for micro_batches in meter.waited(batches_of(sampler, rank)):
            meter.count(micro_batches[-1].slot)
        meters.append(meter)
    for meter in map(copy.copy, meters):
        meter.since_last(lambda *ours: numbers.append(ours) or [ours])
    return meters[0], meters[0].since_last(lambda *ours: numbers)


def test_rates_are_of_the_launch_and_shares_of_each_process_stand_beside_them(monkeypatch):
    """Three updates of 4, 4 and 3 rows; the wait of a process comes four times, the last for the end."""
    _, found = log_of_an_epoch(monkeypatch, seconds=[2.0, 4.0], waits=[0.125, 0.5])
    assert found["perf/examples_per_second"] == 11 / 2.0
    assert found["perf/tokens_per_second"] == LENGTHS.sum() / 2.0
    waits = [4 * 0.125 / 2.0, 4 * 0.5 / 4.0]
    ends = [found[f"perf/rank_data_wait_share_{end}"] for end in ("min", "mean", "max")]
    assert ends == [waits[0], sum(waits) / 2, waits[1]] and found["perf/data_wait_share"] == ends[1]

    tokens, positions = [], []
    for rank in range(2):
        micro_batches = [one for update in batches_of(sampler_of(2), rank) for one in update]
        tokens.append(sum(int(LENGTHS[one.slot.rows].sum()) for one in micro_batches))
        positions.append(sum(one.inputs["input_ids"].numel() for one in micro_batches))
    assert sum(tokens) == LENGTHS.sum() < sum(positions)
    assert found["perf/padding_share"] == 1 - LENGTHS.sum() / sum(positions)
    rates = sorted([tokens[0] / 2.0, tokens[1] / 4.0])
    ends = [found[f"perf/rank_tokens_per_second_{end}"] for end in ("min", "mean", "max")]
    assert ends == [rates[0], sum(rates) / 2, rates[1]]
    shares = sorted(1 - real / all_ for real, all_ in zip(tokens, positions, strict=True))
    ends = [found[f"perf/rank_padding_share_{end}"] for end in ("min", "mean", "max")]
    assert ends == [shares[0], sum(shares) / 2, shares[1]]


def test_a_log_begins_where_the_last_one_ended(monkeypatch):
    meter, first = log_of_an_epoch(monkeypatch, seconds=[2.0], waits=[0.125])
    sampler = sampler_of(1)
    meter.clock = SimpleNamespace(seconds=lambda: 6.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    for micro_batches in meter.waited(itertools.islice(batches_of(sampler, 0), 1)):
        meter.count(micro_batches[-1].slot)
    second = meter.since_last(lambda *ours: [ours])
    assert second["perf/examples_per_second"] == 4 / 4.0
    assert second["perf/data_wait_share"] == 2 / 4.0  # for an update and for the end, of a second each
    assert (first["data/rows"], second["data/rows"]) == (11, 15)


@pytest.mark.parametrize("step", [0, 2, 3, 5, 7])
def test_a_run_that_is_taken_up_counts_on_from_the_rows_and_tokens_before(step):
    sampler, rows, tokens = sampler_of(2), 0, 0
    for update in range(step):
        planned = sampler.plan(update // 3).rows(update % 3)
        rows, tokens = rows + len(planned), tokens + int(LENGTHS[planned].sum())
    values = Throughput(sampler, step, SimpleNamespace(seconds=lambda: 1.0)).since_last(lambda *ours: [ours])
    assert (values["data/rows"], values["data/tokens"]) == (rows, tokens)
