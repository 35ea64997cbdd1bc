"""Orders that need only some shards at a time: every sample once an epoch, any place found at once."""

import time

import numpy as np
import pytest
from data.dealing import config_of, same, take
from tiny import write_data

from miles_fast.data.order import SampleOrder, Share, draw_at, substitute

SIZES = [5, 1, 8, 3, 7, 2, 9]
ENDS = np.cumsum(SIZES)
TOTAL = int(ENDS[-1])


def shard_of(sample):
    return int(np.searchsorted(ENDS, sample, side="right"))


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_every_sample_once_an_epoch_and_few_shards_at_a_time(shards):
    order = SampleOrder(ENDS, 4, shards)
    epochs = []
    for epoch in range(3):
        draws = [order.draw(epoch * TOTAL + i) for i in range(TOTAL)]
        assert sorted(draw.sample for draw in draws) == list(range(TOTAL))
        assert [(draw.epoch, draw.position) for draw in draws] == [(epoch, i) for i in range(TOTAL)]
        for i, draw in enumerate(draws):
            present, coming = order.windows(epoch * TOTAL + i, epoch * TOTAL + i)
            assert len(present) <= shards and shard_of(draw.sample) in present
            assert [shard_of(samples[0]) for samples in draw.window] == list(present)
            assert sorted(draw.window, key=lambda r: r.start)[0].stop in ENDS
            following = next(
                (d for d in draws[i:] if d.window != draw.window), order.draw((epoch + 1) * TOTAL)
            )
            assert [shard_of(samples[0]) for samples in following.window] == list(coming)
        epochs.append([draw.sample for draw in draws])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_window_mixes_its_shards():
    order = SampleOrder(np.arange(1, 21) * 100, 0, 5)
    shards = [order.draw(i).sample // 100 for i in range(500)]
    assert len(set(shards)) == 5 and len(set(shards[:30])) == 5


@pytest.mark.parametrize("shards", [0, 7, 100])
def test_all_shards_at_a_time_is_the_order_without_windows(shards):
    order = SampleOrder(ENDS, 4, shards)
    assert [order.draw(i) for i in range(80)] == [draw_at(TOTAL, 4, i) for i in range(80)]
    assert order.windows(3, 40) == [tuple(range(7))]


def test_a_step_holds_the_same_samples_for_any_number_of_ranks():
    steps = []
    for ranks in (1, 2, 3):
        order = SampleOrder(ENDS, 1, 2)
        shares = [Share(batch=6 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
        steps.append([[order.draw(p).sample for s in shares for p in s.places(t, 0)] for t in range(20)])
    assert steps[0] == steps[1] == steps[2]


def test_substitutes_come_from_the_window():
    order = SampleOrder(ENDS, 1, 2)
    for place in range(0, TOTAL, 3):
        draw = order.draw(place)
        found = {substitute(TOTAL, draw, 1, attempt) for attempt in range(1, 200)}
        assert found == {sample for samples in draw.window for sample in samples}


def test_windows_of_a_batch_that_spans_many():
    order = SampleOrder(ENDS, 2, 1)
    spanned = order.windows(0, TOTAL - 1)
    assert sorted(spanned[:-1]) == [(i,) for i in range(7)] and len(spanned) == 8
    assert spanned[-1] == order.windows(TOTAL, TOTAL)[0]


def test_a_late_place_of_a_large_set_is_found_quickly():
    order = SampleOrder(np.arange(1, 100_001) * 10_000, 0, 16)
    start = time.process_time()
    draws = [order.draw(5 * 10**15 + 123_456_789 + i) for i in range(100)]
    assert time.process_time() - start < 2
    assert len({draw.sample for draw in draws}) == 100


def test_a_loader_with_windows_deals_every_sample_once_and_resumes(tmp_path):
    write_data(tmp_path)  # 24 samples in 2 shards
    config = config_of(tmp_path, [{"shards": [str(tmp_path / "train/*.tar")]}], shuffle_shards=1)
    whole = take(config, 0, 12)
    for epoch in (whole[:6], whole[6:]):
        keys = [key for batch in epoch for key in batch.keys]
        assert sorted(keys) == [f"{i:04d}" for i in range(24)] != keys
        assert {key < "0012" for key in keys[:12]} in ({True}, {False})
    for one, two in zip(whole[5:], take(config, 5, 7), strict=True):
        assert same(one, two)
