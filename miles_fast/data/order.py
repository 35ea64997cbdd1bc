"""Which sample comes when: a pure function of (seed, epoch, position), shared out over ranks.

A step consumes the next positions of an endless stream of shuffled epochs; rank and micro step pick their
slice by arithmetic, so that resuming, or another number of ranks at the same global batch, needs no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One place in the order: the sample to read and what seeds its random stream.

    `window` holds the samples that it was shuffled with, shard by shard; None: all of the set.
    """

    sample: int
    epoch: int
    position: int
    window: tuple[range, ...] | None = None


def _stream(*words: int, key: tuple[int, ...] = ()) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words, spawn_key=key)))


@lru_cache(maxsize=4)
def _shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return _stream(seed, epoch).permutation(num_samples)


def draw_at(num_samples: int, seed: int, place: int) -> Draw:
    """The draw at a place (from 0) of the endless stream: every sample exactly once per epoch."""
    epoch, position = divmod(place, num_samples)
    return Draw(sample=int(_shuffled(num_samples, seed, epoch)[position]), epoch=epoch, position=position)


def substitute(num_samples: int, draw: Draw, seed: int, attempt: int) -> int:
    """Sample that replaces an unreadable one: drawn from (seed, epoch, position, attempt), attempt from 1.

    It comes from the draw's window, whose shards are at hand.
    """
    stream = _stream(seed, draw.epoch, draw.position, attempt)
    if draw.window is None:
        return int(stream.integers(num_samples))
    number = int(stream.integers(sum(map(len, draw.window))))
    for samples in draw.window:
        if number < len(samples):
            return samples[number]
        number -= len(samples)
    raise AssertionError("the window is longer than its shards")


@dataclass(frozen=True)
class _Epoch:
    """Shards in the order in which an epoch takes them, and where each window ends, in positions."""

    shards: np.ndarray
    window_ends: np.ndarray


class SampleOrder:
    """The order of one source. Each epoch shuffles the shards, takes them in windows of `shuffle_shards`, and
    shuffles the samples of a window together: only the shards of a window need to be at hand.

    Any place is found from the shards' sizes alone, wherever it lies: one array of shards per epoch, one of
    samples per window. With `shuffle_shards` 0 all samples are shuffled together (`draw_at`).
    """

    def __init__(self, shard_ends: Sequence[int] | np.ndarray, seed: int, shuffle_shards: int = 0) -> None:
        """`shard_ends`: number of samples up to the end of each shard."""
        self._ends = np.asarray(shard_ends, dtype=np.int64)
        self._sizes = np.diff(self._ends, prepend=0)
        self.num_samples, self.seed = int(self._ends[-1]), seed
        self.shuffle_shards = 0 if shuffle_shards >= len(self._ends) else shuffle_shards
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._window = lru_cache(maxsize=8)(self._make_window)

    def draw(self, place: int) -> Draw:
        """The draw at a place (from 0) of the endless stream: every sample exactly once per epoch."""
        if not self.shuffle_shards:
            return draw_at(self.num_samples, self.seed, place)
        epoch, position = divmod(place, self.num_samples)
        ends = self._epoch(epoch).window_ends
        window = int(np.searchsorted(ends, position, side="right"))
        samples, ranges = self._window(epoch, window)
        sample = int(samples[position - (int(ends[window - 1]) if window else 0)])
        return Draw(sample=sample, epoch=epoch, position=position, window=ranges)

    def windows(self, first: int, last: int) -> list[tuple[int, ...]]:
        """Shards of each window from the one of place `first` to the one after that of place `last`."""
        if not self.shuffle_shards:
            return [tuple(range(len(self._ends)))]
        (epoch, window), end = self._locate(first), self._locate(last)
        found = []
        while True:
            shards, ends = self._epoch(epoch).shards, self._epoch(epoch).window_ends
            start = window * self.shuffle_shards
            found.append(tuple(shards[start : start + self.shuffle_shards].tolist()))
            if (epoch, window) > end:
                return found
            epoch, window = (epoch, window + 1) if window + 1 < len(ends) else (epoch + 1, 0)

    def _locate(self, place: int) -> tuple[int, int]:
        epoch, position = divmod(place, self.num_samples)
        return epoch, int(np.searchsorted(self._epoch(epoch).window_ends, position, side="right"))

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = _stream(self.seed, epoch, key=(0,)).permutation(len(self._ends))
        ends = np.cumsum(self._sizes[shards])
        last = np.append(np.arange(self.shuffle_shards, len(ends), self.shuffle_shards), len(ends)) - 1
        return _Epoch(shards, ends[last])

    def _make_window(self, epoch: int, window: int) -> tuple[np.ndarray, tuple[range, ...]]:
        start = window * self.shuffle_shards
        shards = self._epoch(epoch).shards[start : start + self.shuffle_shards]
        ranges = tuple(range(int(self._ends[s] - self._sizes[s]), int(self._ends[s])) for s in shards)
        samples = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
        return _stream(self.seed, epoch, key=(1, window)).permutation(samples), ranges


@dataclass(frozen=True, kw_only=True)
class Share:
    """How the global batch is dealt: clips per rank and micro step, micro steps per optimizer step, ranks."""

    batch: int
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1

    @property
    def global_batch(self) -> int:
        """Clips of one optimizer step over all ranks and micro steps."""
        return self.batch * self.accumulation * self.ranks

    def places(self, source_step: int, micro: int) -> range:
        """Places of this rank's clips in micro step `micro` of a source's `source_step`-th optimizer step."""
        start = source_step * self.global_batch + (micro * self.ranks + self.rank) * self.batch
        return range(start, start + self.batch)
