"""Which patches are masked: exact in number, seeded by (seed, step, rank).

Patterns are tubes (the same positions in every frame, the paper's choice) or drawn per frame; ratio and the
block generator are inferred (spec/miles.md 3).
"""

from __future__ import annotations

import math

import numpy as np

from miles_fast.config import Config, MaskConfig


def draw_masks(
    config: MaskConfig, *, grid: int, num_frames: int, batch: int, seed: int, step: int, rank: int
) -> np.ndarray:
    """Masked patches of a batch, (B, M) int64: distinct and ascending per clip, frame-major."""
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, rank, 0x4D41534B))))
    masks = [_draw_clip(config, grid, num_frames, stream) for _ in range(batch)]
    return np.stack(masks)


def draw_step_masks(config: Config, batch: int, rank: int, micro_step: int) -> np.ndarray:
    """`draw_masks` for one rank's micro batch of a run."""
    return draw_masks(
        config.method.mask,
        grid=config.model.video.grid,
        num_frames=config.data.frames_per_clip,
        batch=batch,
        seed=config.run.seed,
        step=micro_step,
        rank=rank,
    )


def _draw_clip(config: MaskConfig, grid: int, num_frames: int, stream: np.random.Generator) -> np.ndarray:
    count, positions = config.masked_per_frame(grid), grid * grid
    if config.kind == "frame_random":
        frames = [np.sort(stream.permutation(positions)[:count]) for _ in range(num_frames)]
        return np.concatenate([frame + t * positions for t, frame in enumerate(frames)])
    if config.kind == "tube_random":
        tube = np.sort(stream.permutation(positions)[:count])
    else:
        tube = np.flatnonzero(_draw_blocks(grid, count, stream))
    return (np.arange(num_frames)[:, None] * positions + tube).reshape(-1)


def _draw_blocks(grid: int, count: int, stream: np.random.Generator) -> np.ndarray:
    """BEiT's rectangles (area from 16 cells of 14 x 14, aspect 0.3 to 1 / 0.3), the last one trimmed."""
    masked = np.zeros((grid, grid), dtype=bool)
    smallest = max(1, round(16 * grid * grid / 196))
    missing = count
    while missing:
        area = stream.uniform(min(smallest, missing), max(smallest, missing))
        aspect = math.exp(stream.uniform(math.log(0.3), math.log(1 / 0.3)))
        height = min(max(round(math.sqrt(area * aspect)), 1), grid)
        width = min(max(round(math.sqrt(area / aspect)), 1), grid)
        top = stream.integers(0, grid - height + 1)
        left = stream.integers(0, grid - width + 1)
        block = masked[top : top + height, left : left + width]
        new = np.flatnonzero(~block)[:missing]
        block[np.unravel_index(new, block.shape)] = True
        missing -= len(new)
    return masked
