"""Masks: exact, distinct, covering, reproducible."""

import numpy as np
import pytest

from miles_fast.config import MaskConfig
from miles_fast.training.masks import draw_masks


def draw(kind, ratio=0.5, grid=14, frames=4, batch=6, seed=0, step=3, rank=0):
    config = MaskConfig(kind=kind, ratio=ratio)
    return draw_masks(config, grid=grid, num_frames=frames, batch=batch, seed=seed, step=step, rank=rank)


@pytest.mark.parametrize("kind", ["tube_block", "tube_random", "frame_random"])
@pytest.mark.parametrize(
    "ratio,grid,frames", [(0.5, 14, 4), (0.3, 4, 1), (0.9, 14, 2), (0.01, 3, 2), (0.99, 3, 5)]
)
def test_counts_are_exact_and_indices_distinct(kind, ratio, grid, frames):
    masks = draw(kind, ratio, grid, frames)
    count = min(max(round(ratio * grid * grid), 1), grid * grid - 1)
    assert masks.shape == (6, frames * count) and masks.dtype == np.int64
    assert MaskConfig(kind=kind, ratio=ratio).masked_per_frame(grid) == count
    for clip in masks:
        assert (np.diff(clip) > 0).all()
        np.testing.assert_array_equal(np.bincount(clip // grid**2, minlength=frames), count)


@pytest.mark.parametrize("kind", ["tube_block", "tube_random"])
def test_tubes_are_the_same_in_every_frame(kind):
    for clip in draw(kind):
        frames = clip.reshape(4, -1) - 196 * np.arange(4)[:, None]
        assert (frames == frames[0]).all()


def test_frames_differ_when_drawn_per_frame():
    clip = draw("frame_random")[0].reshape(4, -1) - 196 * np.arange(4)[:, None]
    assert any((clip[0] != clip[t]).any() for t in range(1, 4))


@pytest.mark.parametrize("kind", ["tube_block", "tube_random", "frame_random"])
def test_masks_are_a_function_of_seed_step_and_rank(kind):
    np.testing.assert_array_equal(draw(kind), draw(kind))
    for change in ({"seed": 1}, {"step": 4}, {"rank": 1}):
        assert (draw(kind, **change) != draw(kind)).any()


def test_every_position_is_masked_about_equally_often_and_blocks_cohere():
    grid = 14
    masks = draw("tube_random", batch=2000, frames=1)
    share = np.bincount(masks.ravel(), minlength=grid**2) / 2000
    assert abs(share - 0.5).max() < 0.06

    def neighbours(masks):
        picture = np.zeros((len(masks), grid * grid), bool)
        np.put_along_axis(picture, masks, True, 1)
        picture = picture.reshape(-1, grid, grid)
        return (picture[:, :, 1:] == picture[:, :, :-1]).mean()

    assert neighbours(draw("tube_block", batch=200, frames=1)) > 0.8
    assert abs(neighbours(masks) - 0.5) < 0.02
