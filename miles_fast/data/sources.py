"""A source of the config as a set of shards: local, or remote through the cache."""

from __future__ import annotations

import os
from pathlib import Path

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.locations import Access, expand_shards, is_remote
from miles_fast.data.order import SampleOrder
from miles_fast.data.shard_cache import ShardCache
from miles_fast.data.shards import ShardSet

REMOTE_WINDOW = 16  # shards of a remote source that are shuffled together unless data.shuffle_shards says


def open_shards(source: SourceConfig, data: DataConfig) -> ShardSet:
    """The shards of a source, every index read. Raises ShardError."""
    access = Access(
        prefixes=tuple(data.allowed_prefixes),
        attempts=data.download_attempts,
        timeout_seconds=data.download_timeout_seconds,
        s3_endpoint=data.s3_endpoint,
    )
    names = expand_shards(source.shards, access)
    if not any(map(is_remote, names)):
        return ShardSet(names)
    folder = Path(data.cache_folder) if data.cache_folder else _user_cache()
    return ShardSet(names, cache=ShardCache(folder.absolute(), int(data.cache_gib * 2**30), access))


def order_of(shards: ShardSet, data: DataConfig, seed: int) -> SampleOrder:
    """The order in which training goes through a source."""
    window = data.shuffle_shards
    if window is None:
        window = REMOTE_WINDOW if shards.cache is not None else 0
    return SampleOrder(shards.shard_ends, seed, window)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles_fast" / "shards"
