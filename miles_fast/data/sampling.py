"""What is drawn for one sample: its random stream, its frames, its crop and its flip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def sample_stream(seed: int, epoch: int, position: int, attempt: int = 0) -> np.random.Generator:
    """Random stream of one sample: the same for every rank count, worker count and resume.

    `attempt` counts substitutions of a bad sample; it is 0 for the sample that the order names.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, position, attempt))))


def segment_frames(
    num_available: int, num_frames: int, stream: np.random.Generator | None = None
) -> np.ndarray:
    """Indices of `num_frames` frames out of `num_available`, one from each of equal segments, in order.

    Without a stream the middle frame of each segment (the published evaluation: spec/miles.md 9.4, 100 frames
    -> 12, 37, 62, 87); with one a uniformly drawn frame of the whole segment, its last frame included (the
    official code leaves out the last one or two: 8.2). A clip shorter than `num_frames` repeats frames;
    nothing is padded. Raises ValueError when either count is below 1.
    """
    if num_available < 1 or num_frames < 1:
        raise ValueError(f"cannot choose {num_frames} frames out of {num_available}: both must be at least 1")
    edges = np.linspace(0, num_available, num_frames + 1).astype(np.int64)
    first = np.minimum(edges[:-1], num_available - 1)
    last = np.maximum(edges[1:] - 1, first)
    if stream is None:
        return (first + last) // 2
    return stream.integers(first, last + 1)


def timed_frames(seconds: np.ndarray, num_frames: int) -> np.ndarray:
    """Indices of at most `num_frames` frames, those shown at the middle of equal segments of time, in order.

    `seconds` (N + 1,) are the times at which the N frames appear and at which the last one ends. At a
    constant rate (no frame further than half a frame from its place) these are the frames of
    `segment_frames`. A frame that is shown for long may be chosen more than once; a clip of no more than
    `num_frames` frames gives each of them once. Raises ValueError when either count is below 1.
    """
    available = len(seconds) - 1
    num_frames = min(num_frames, available)
    by_index = segment_frames(available, num_frames)
    length = float(seconds[-1] - seconds[0])
    if num_frames == available or length <= 0:
        return by_index
    starts = np.asarray(seconds[:-1], dtype=np.float64) - seconds[0]
    if np.abs(starts - np.arange(available) * (length / available)).max() <= length / available / 2:
        return by_index
    middles = (np.arange(num_frames) + 0.5) * (length / num_frames)
    return np.searchsorted(starts, middles, side="right") - 1


@dataclass(frozen=True, kw_only=True)
class View:
    """Crop as fractions of the frame (start and end, y before x) and whether the clip is mirrored."""

    start_yx: tuple[float, float]
    end_yx: tuple[float, float]
    mirror: bool

    def within(self, shown_yx: tuple[float, float]) -> View:
        """The same view of a frame of which only the upper left part, so much of it, is shown."""
        y, x = shown_yx
        start, end = self.start_yx, self.end_yx
        return View(
            start_yx=(start[0] * y, start[1] * x), end_yx=(end[0] * y, end[1] * x), mirror=self.mirror
        )


def training_view(
    stream: np.random.Generator, height: int, width: int, scale: tuple[float, float], flip: float = 0.5
) -> View:
    """One RandomResizedCrop (area in `scale`, aspect 3/4 to 4/3, ten tries, then the centre), one flip.

    The same rule as torchvision's, which the official transform uses (spec/miles.md 4.2); drawn once per
    clip.
    """
    mirror = bool(stream.random() < flip)
    area = height * width
    for _ in range(10):
        target = area * stream.uniform(*scale)
        aspect = math.exp(stream.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(stream.integers(0, height - crop_height + 1))
            left = int(stream.integers(0, width - crop_width + 1))
            break
    else:
        crop_width = min(width, round(height * 4 / 3))
        crop_height = min(height, round(width * 4 / 3))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return View(
        start_yx=(top / height, left / width),
        end_yx=((top + crop_height) / height, (left + crop_width) / width),
        mirror=mirror,
    )


def evaluation_view(height: int, width: int) -> View:
    """The centre square: the published resize 256, centre crop 256, resize as one resampling."""
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    return View(
        start_yx=(top / height, left / width),
        end_yx=((top + side) / height, (left + side) / width),
        mirror=False,
    )
