"""Remote shards are downloaded before they are needed: the next window while the present one is read."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from miles_fast.data.downloads import Stopped
from miles_fast.data.order import SampleOrder
from miles_fast.data.remote_file import RemoteFile
from miles_fast.data.shard_cache import ShardCache
from miles_fast.data.shard_index import ShardError
from miles_fast.data.shards import ShardSet

logger = logging.getLogger(__name__)

NUM_DOWNLOADS = 4
_TOUCH_SECONDS = 10.0
_AGAIN_SECONDS = 0.5
_AFTER_ERROR_SECONDS = 30.0


class Prefetcher:
    """Downloads what is wanted, in order, on threads of its own; what is wanted is not pushed out meanwhile.

    It never raises: a shard that cannot be had is asked for again later, and whoever reads it raises.
    """

    def __init__(self, cache: ShardCache, num_downloads: int = NUM_DOWNLOADS) -> None:
        self._cache = cache
        self._wanted: dict[Path, RemoteFile] = {}
        self._due: dict[Path, float] = {}  # when to try next; what is at hand is not here
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._touched = 0.0
        for number in range(num_downloads):
            threading.Thread(target=self._work, name=f"prefetch {number}", daemon=True).start()

    def want(self, files: Iterable[RemoteFile]) -> None:
        """From now on these are wanted, the first ones first, and no others."""
        wanted = {self._cache.path(file): file for file in files}
        with self._changed:
            news = wanted.keys() != self._wanted.keys()
            if news:
                self._due = {path: self._due.get(path, 0.0) for path in wanted}
                self._wanted = wanted
                self._changed.notify_all()
        if news or time.monotonic() - self._touched > _TOUCH_SECONDS:
            # Other processes push out what was used longest ago.
            self._cache.touch(wanted)
            self._touched = time.monotonic()

    def close(self) -> None:
        """Give up what is being downloaded."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            path = self._next()
            if path is None:
                return
            again = _AGAIN_SECONDS
            try:
                file = self._wanted.get(path)
                if file is not None and self._cache.fetch(
                    file, stop=self._stop, keep=lambda: self._wanted, wait=False
                ):
                    again = _TOUCH_SECONDS  # it is at hand; look again whether nobody pushed it out
            except Stopped:
                return
            except (ShardError, OSError) as error:
                logger.warning("prefetch failed, and is tried again later: %s", error)
                again = _AFTER_ERROR_SECONDS
            with self._changed:
                if path in self._due:
                    self._due[path] = time.monotonic() + again

    def _next(self) -> Path | None:
        """The first wanted shard that is due, None at the end."""
        with self._changed:
            while not self._stop.is_set():
                now = time.monotonic()
                for path, due in self._due.items():
                    if due <= now:
                        self._due[path] = float("inf")  # nobody else takes it
                        return path
                first = min(self._due.values(), default=float("inf"))
                self._changed.wait(None if first == float("inf") else max(first - now, 0.01))
        return None


class WindowPrefetcher:
    """Keeps the windows of shards that requests of several sources touch, and the next ones, in the cache."""

    def __init__(self, shard_sets: Sequence[ShardSet], orders: Sequence[SampleOrder], pending: int) -> None:
        """`pending`: how many requests of a source may be on their way at the same time."""
        self._shard_sets, self._orders = shard_sets, orders
        self._recent = [deque[list[tuple[int, ...]]](maxlen=pending) for _ in shard_sets]
        caches = [shards.cache for shards in shard_sets if shards.cache is not None]
        self._prefetcher = Prefetcher(caches[0]) if caches else None

    def coming(self, source: int, first: int, last: int) -> None:
        """Places `first` to `last` of a source are read next."""
        if self._prefetcher is None or self._shard_sets[source].cache is None:
            return
        self._recent[source].append(self._orders[source].windows(first, last))
        present: list[RemoteFile] = []
        following: list[RemoteFile] = []
        for shards, recent in zip(self._shard_sets, self._recent, strict=True):
            for windows in recent:
                for number, window in enumerate(windows, start=1):
                    wanted = following if number == len(windows) > 1 else present
                    files = map(shards.paths.__getitem__, window)
                    wanted.extend(file for file in files if isinstance(file, RemoteFile))
        self._prefetcher.want([*present, *following])

    def close(self) -> None:
        """End the downloads."""
        if self._prefetcher is not None:
            self._prefetcher.close()


class SequentialPrefetcher:
    """Has the shards that evaluation reads now, and the next one, in the cache as far as they fit."""

    def __init__(self, shards: ShardSet, samples: range, pending: int) -> None:
        """`samples` are read, in order; `pending`: how many requests may be on their way at the same time."""
        self._shards, self._samples = shards, samples
        self._starts = deque[int](maxlen=pending)
        self._prefetcher = Prefetcher(shards.cache) if shards.cache is not None else None

    def coming(self, first: int, last: int) -> None:
        """Samples `first` to `last` are read next."""
        if self._prefetcher is None or self._shards.cache is None:
            return
        self._starts.append(first)
        ends = self._shards.shard_ends
        places = self._starts[0], last, self._samples[-1]
        present, read, final = np.searchsorted(ends, places, side="right").tolist()
        wanted: list[RemoteFile] = []
        room = self._shards.cache.bound_bytes
        for file in self._shards.paths[present : min(read + 1, final) + 1]:
            if isinstance(file, RemoteFile) and file.size <= room:
                wanted.append(file)
                room -= file.size
        self._prefetcher.want(wanted)

    def close(self) -> None:
        """End the downloads."""
        if self._prefetcher is not None:
            self._prefetcher.close()


def check_room(shard_sets: Sequence[ShardSet], orders: Sequence[SampleOrder]) -> None:
    """Refuse a cache that cannot hold two windows of each source. Raises ShardError."""
    bounds = [shards.cache.bound_bytes for shards in shard_sets if shards.cache is not None]
    needed = 0
    for shards, order in zip(shard_sets, orders, strict=True):
        sizes = sorted((p.size for p in shards.paths if isinstance(p, RemoteFile)), reverse=True)
        needed += sum(sizes[: 2 * order.shuffle_shards] if order.shuffle_shards else sizes)
    if needed > min(bounds, default=0):
        raise ShardError(
            f"the cache of remote shards holds {min(bounds) / 2**30:.3f} GiB, but the present and the next "
            f"windows of all sources may take {needed / 2**30:.3f}: raise data.cache_gib, or lower "
            "data.shuffle_shards"
        )
