"""Order and sampling: every sample once per epoch for any number of ranks; the spec's frames; crops."""

import numpy as np
import pytest

from miles_fast.data.order import Share, draw_at, substitute
from miles_fast.data.sampling import (
    evaluation_view,
    sample_stream,
    segment_frames,
    timed_frames,
    training_view,
)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_sample_exactly_once_per_epoch(ranks, accumulation):
    samples, batch = 36, 6 // ranks
    seen = []
    for step in range(2 * samples // (6 * accumulation)):
        for micro in range(accumulation):
            for rank in range(ranks):
                share = Share(batch=batch, accumulation=accumulation, rank=rank, ranks=ranks)
                seen += [draw_at(samples, 7, place) for place in share.places(step, micro)]
    for epoch in (0, 1):
        assert sorted(d.sample for d in seen if d.epoch == epoch) == list(range(samples))
    orders = [[d.sample for d in seen if d.epoch == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_a_step_holds_the_same_samples_for_any_number_of_ranks():
    steps = []
    for ranks in (1, 2, 3):
        shares = [Share(batch=6 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
        steps.append([[draw_at(50, 1, p).sample for s in shares for p in s.places(t, 0)] for t in range(20)])
    assert steps[0] == steps[1] == steps[2]


def test_substitutes_are_reproducible_and_vary():
    draw = draw_at(100, 0, 5)
    found = [substitute(100, draw, 0, attempt) for attempt in range(1, 20)]
    assert found == [substitute(100, draw, 0, attempt) for attempt in range(1, 20)]
    assert len(set(found)) > 10


@pytest.mark.parametrize(
    "available,expected",
    [
        (100, [12, 37, 62, 87]),
        (300, [37, 112, 187, 262]),
        (13, [1, 4, 7, 10]),
        (7, [0, 1, 3, 5]),
        (2, [0, 0, 1, 1]),
    ],
)
def test_middle_frames_are_the_specs(available, expected):
    assert segment_frames(available, 4).tolist() == expected


@pytest.mark.parametrize("available", [1, 2, 3, 4, 5, 7, 8, 100])
def test_drawn_frames_cover_every_segment_whole(available):
    draws = np.array([segment_frames(available, 4, sample_stream(0, 0, i)) for i in range(600)])
    assert (np.diff(draws, axis=1) >= 0).all() and draws.min() >= 0
    assert set(draws.ravel()) == set(
        range(available)
    )  # the official sampler never draws a segment's last frames


def test_frames_of_nothing_are_refused():
    with pytest.raises(ValueError, match="4 frames out of 0"):
        segment_frames(0, 4)


def test_crops_stay_inside_and_keep_scale_and_aspect():
    areas, mirrors = [], 0
    for i in range(500):
        view = training_view(sample_stream(1, 0, i), 240, 320, (0.5, 1.0))
        (top, left), (bottom, right) = view.start_yx, view.end_yx
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
        height, width = (bottom - top) * 240, (right - left) * 320
        assert 0.74 < width / height < 1.35
        areas.append((bottom - top) * (right - left))
        mirrors += view.mirror
    assert 0.49 < min(areas) and max(areas) > 0.9 and 200 < mirrors < 300
    assert training_view(sample_stream(1, 0, 3), 240, 320, (0.5, 1.0)) == training_view(
        sample_stream(1, 0, 3), 240, 320, (0.5, 1.0)
    )


def test_evaluation_takes_the_centre_square():
    view = evaluation_view(240, 320)
    assert view.start_yx == (0, 0.125) and view.end_yx == (1, 0.875) and not view.mirror


@pytest.mark.parametrize("available", [1, 3, 8, 10, 12, 100, 301])
def test_frames_by_time_are_those_by_index_at_a_constant_rate(available):
    jitter = np.random.default_rng(0).integers(0, 2, available + 1) / 1000  # a millisecond's rounding
    seconds = np.arange(available + 1) / 25 + np.maximum.accumulate(jitter)
    for wanted in (1, 4, 8, 16):
        expected = segment_frames(available, min(wanted, available))
        assert timed_frames(seconds, wanted).tolist() == expected.tolist()


def test_frames_by_time_at_a_variable_rate():
    # A still of 8 s, then eight frames in the last second: three of four segments lie in the still.
    seconds = np.array([0, 8, 8.125, 8.25, 8.375, 8.5, 8.625, 8.75, 8.875, 9])
    assert timed_frames(seconds, 4).tolist() == [0, 0, 0, 0]
    assert timed_frames(seconds, 6).tolist() == [0, 0, 0, 0, 0, 3]  # middles .75, 2.25, ..., 8.25
    assert timed_frames(seconds, 9).tolist() == list(range(9))
    assert timed_frames(np.zeros(7), 3).tolist() == [0, 2, 4]  # no times at all: by index
    with pytest.raises(ValueError, match="cannot choose"):
        timed_frames(np.array([0.0]), 4)
