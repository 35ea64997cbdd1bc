"""Inputs of preparation that lie elsewhere: https, http and s3 addresses, fetched when it is their turn."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from miles_fast.data.preparation_options import PreparationError

logger = logging.getLogger(__name__)

_SCHEMES = ("http", "https", "s3")
_TRIES = 4
_PAUSE_SECONDS = 1.0  # before the second try; twice as long before each further one


@dataclass(frozen=True)
class RemoteTars:
    """WebDataset tars that are fetched one by one; each becomes one shard, so that none is read twice."""

    urls: tuple[str, ...]

    @classmethod
    def open(cls, patterns: Sequence[str]) -> RemoteTars:
        """Addresses by braces and, on s3, by globs, each once, sorted. Raises PreparationError."""
        from braceexpand import UnbalancedBracesError, braceexpand

        found: set[str] = set()
        for pattern in patterns:
            try:
                named = list(braceexpand(pattern))
            except UnbalancedBracesError as error:
                raise PreparationError(
                    f"{shown(pattern)}: {error}; write it as '{{00000..00041}}'"
                ) from error
            found.update(url for one in named for url in _matches(one))
        return cls(tuple(sorted(found)))


def is_remote(name: str) -> bool:
    """Whether a name is an address to fetch from. PreparationError for a scheme that is not known."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    if scheme is None or scheme[1].lower() == "file":
        return False
    if scheme[1].lower() not in _SCHEMES:
        raise PreparationError(
            f"{shown(name)}: inputs are read from {', '.join(_SCHEMES)} and file, not from {scheme[1]}"
        )
    return True


def local_name(name: str) -> str:
    """The path that a `file:` address names; other names as they are."""
    if not name.lower().startswith("file:"):
        return name
    parts = urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise PreparationError(f"{name}: names the machine {parts.netloc}; write file:///PATH")
    return unquote(parts.path)


def shown(url: str) -> str:
    """The address without what may be secret in it: user, password, signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextlib.contextmanager
def fetched(url: str, folder: Path) -> Iterator[Path]:
    """A copy of the file in a folder of its own below `folder`, under its own name; deleted at the end.

    Raises PreparationError when it is not there, or does not come whole in four tries.
    """
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not name:
        raise PreparationError(f"{shown(url)}: names no file")
    with tempfile.TemporaryDirectory(prefix=".fetched.", suffix=".partial", dir=folder) as place:
        path = Path(place) / name
        _fetch(url, path)
        yield path


def _fetch(url: str, path: Path) -> None:
    system = _file_system(url)
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            # aiohttp holds an answer to its length by itself; `info` calls every failure of http "not found".
            wanted = system.info(url)["size"] if url.lower().startswith("s3:") else None
            system.get_file(url, str(path))
        except (FileNotFoundError, PermissionError) as error:
            raise PreparationError(
                f"{shown(url)}: is not there, or may not be read ({type(error).__name__}); correct the "
                "address, or log in as its storage wants it"
            ) from error
        except _failures() as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = f"{type(error).__name__}: {error}".replace(url, shown(url))
        else:
            if wanted is None or path.stat().st_size == wanted:
                return
            problem = f"{path.stat().st_size} of {wanted} bytes came"
        logger.warning("%s: try %d of %d failed: %s", shown(url), attempt + 1, _TRIES, problem)
    raise PreparationError(
        f"{shown(url)}: could not be fetched in {_TRIES} tries ({problem}); finished shards are kept: run "
        "the same command again"
    )


def _matches(url: str) -> list[str]:
    if not set("*?[") & set(urlsplit(url).path):
        return [url]
    if not url.lower().startswith("s3://"):
        raise PreparationError(f"{shown(url)}: only s3 can be searched; write numbers as {{00000..00041}}")
    try:
        found = [f"s3://{match}" for match in _file_system(url).glob(url)]
    except _failures() as error:
        raise PreparationError(f"{shown(url)}: cannot be searched ({error})") from error
    if not found:
        raise PreparationError(f"{shown(url)}: matches nothing; correct the address")
    return found


def _file_system(url: str):
    try:
        import fsspec

        return fsspec.filesystem(urlsplit(url).scheme.lower())
    except ImportError as error:
        raise PreparationError(
            f"{shown(url)}: what reads such addresses is not installed ({error}): "
            "pip install 'miles-fast[remote]'"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What reading from afar may raise and a later try may mend."""
    try:
        import aiohttp
    except ImportError:
        return (OSError,)
    return (OSError, aiohttp.ClientError)
