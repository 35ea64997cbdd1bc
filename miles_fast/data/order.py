"""Which sample comes when: a pure function of (seed, epoch, position), shared out over ranks.

A step consumes the next positions of an endless stream of shuffled epochs; rank and micro step pick their
slice by arithmetic, so that resuming, or another number of ranks at the same global batch, needs no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One place in the order: the sample to read and what seeds its random stream."""

    sample: int
    epoch: int
    position: int


@lru_cache(maxsize=4)
def _shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return stream.permutation(num_samples)


def draw_at(num_samples: int, seed: int, place: int) -> Draw:
    """The draw at a place (from 0) of the endless stream: every sample exactly once per epoch."""
    epoch, position = divmod(place, num_samples)
    return Draw(sample=int(_shuffled(num_samples, seed, epoch)[position]), epoch=epoch, position=position)


def substitute(num_samples: int, draw: Draw, seed: int, attempt: int) -> int:
    """Sample that replaces an unreadable one: drawn from (seed, epoch, position, attempt), attempt from 1."""
    stream = np.random.Generator(
        np.random.Philox(np.random.SeedSequence((seed, draw.epoch, draw.position, attempt)))
    )
    return int(stream.integers(num_samples))


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
