"""Inputs of preparation that lie elsewhere: https, http and s3 URLs, fetched when it is their turn."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from miles_fast.data.downloads import describe, download, matching
from miles_fast.data.locations import access_to, expand_braces, shown
from miles_fast.data.preparation_options import PreparationError
from miles_fast.data.shard_index import ShardError


@dataclass(frozen=True)
class RemoteTars:
    """WebDataset tars that are fetched one by one; each becomes one shard, so that none is read twice."""

    urls: tuple[str, ...]

    @classmethod
    def open(cls, patterns: Sequence[str]) -> RemoteTars:
        """URLs by braces and, on s3, by globs, each once, sorted. Raises PreparationError, ShardError."""
        named = [url for pattern in patterns for url in expand_braces(pattern)]
        return cls(tuple(sorted({match for url in named for match in _matches(url)})))


@contextlib.contextmanager
def fetched(url: str, folder: Path) -> Iterator[Path]:
    """A copy of the file in a folder of its own below `folder`, under its own name; deleted at the end.

    Raises PreparationError when it is not there, may not be read, or does not come whole.
    """
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not name:
        raise PreparationError(f"{shown(url)}: names no file")
    with tempfile.TemporaryDirectory(prefix=".fetched.", suffix=".partial", dir=folder) as place:
        path = Path(place) / name
        try:
            access = access_to(url)
            with open(path, "wb") as file:
                download(describe(url, access), file, access)
        except ShardError as error:
            raise PreparationError(
                f"{error}; finished shards are kept: run the same command again"
            ) from error
        yield path


def _matches(url: str) -> list[str]:
    access = access_to(url)
    if not set("*[") & set(urlsplit(url).path):
        return [url]
    if not url.lower().startswith("s3:"):
        raise PreparationError(f"{shown(url)}: only s3 can be searched; write numbers as {{00000..00041}}")
    found = matching(url, access)
    if not found:
        raise PreparationError(f"{shown(url)}: matches nothing; correct the URL")
    return found
