"""What a server says about a file."""

from __future__ import annotations

from dataclasses import dataclass

from miles_fast.data.locations import shown
from miles_fast.data.shard_index import ShardError


class MissingError(ShardError):
    """The server has no such file, or does not show it."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as the server describes it: `version` is its ETag, else its date, else empty."""

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return shown(self.url)
