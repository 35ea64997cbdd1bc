"""The local cache of remote shards: bounded, shared by all processes of a host that use its folder.

A tar is stored under its URL, size and version, so that another version is another file. It is written aside,
compared with its index, and renamed; a lock lets one process download it once. Room is taken before a
download begins, from the least recently used tars that nobody reads. Indexes and empty lock files stay; they
do not count against the bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from miles_fast.data.downloads import describe, download, read_small
from miles_fast.data.locations import Access, shown
from miles_fast.data.remote_file import MissingError, RemoteFile
from miles_fast.data.shard_index import Listing, ShardError, parse_index, say_once, scan, write_index

logger = logging.getLogger(__name__)

MAX_INDEX_BYTES = 1 << 30
MAX_ROOM_SECONDS = 600.0
_GIB = 1 << 30


def nothing_to_keep() -> Collection[Path]:
    """The default of `ShardCache.fetch`."""
    return ()


class ShardCache:
    """Remote shards as local files; processes may share it, and it may be pickled."""

    def __init__(self, folder: Path, bound_bytes: int, access: Access) -> None:
        self.folder, self.bound_bytes, self.access = folder, bound_bytes, access
        try:
            (folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(
                f"{folder}: the cache of remote shards cannot be made there ({error.strerror}); name another "
                "data.cache_folder"
            ) from error

    def path(self, file: RemoteFile) -> Path:
        """Where a shard lies while it is in the cache."""
        digest = hashlib.sha256(f"{file.url}\n{file.size}\n{file.version}".encode()).hexdigest()
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", urlsplit(file.url).path.rpartition("/")[2].removesuffix(".tar"))
        return self.folder / f"{stem[:60]}-{digest[:24]}.tar"

    def look_up(self, url: str) -> tuple[RemoteFile, Listing]:
        """What the server has under a URL now, and the listing of its members.

        The index is the cached one, else the server's `X.idx` beside the tar, else it is built from the tar,
        which is downloaded for it. Raises ShardError.
        """
        file = describe(url, self.access)
        if file.size > self.bound_bytes:
            raise ShardError(
                f"{file}: {file.size / _GIB:.3f} GiB, more than the whole cache of "
                f"{self.bound_bytes / _GIB:.3f} GiB; raise data.cache_gib or write smaller shards"
            )
        index = self.path(file).with_suffix(".idx")
        if not index.exists():
            self._find_index(file)
        return file, _read_index(index, file)

    def _find_index(self, file: RemoteFile) -> None:
        url = _index_url(file.url)
        try:
            text = read_small(url, self.access, MAX_INDEX_BYTES).decode("utf-8", "surrogateescape")
            listing = parse_index(text)
        except MissingError:
            say_once(
                f"{shown(url).rpartition('/')[0]}: shards without index are downloaded once to be indexed; "
                "put the .idx files beside the tars to spare that"
            )
            self.fetch(file)  # and index it: others may push it out before it could be opened
            if not self.path(file).with_suffix(".idx").exists():  # it lay there without
                number = self.open(file)
                try:
                    self._write_index(file, scan(self.path(file), str(file)))
                finally:
                    os.close(number)
            return
        except ShardError:
            raise
        except ValueError as error:
            raise ShardError(
                f"{shown(url)} is not a usable index ({error}); build it anew, or take it away"
            ) from error
        if max(map(int.__add__, listing.offsets, listing.sizes)) > file.size:
            raise ShardError(
                f"{shown(url)} names bytes beyond the {file.size} of {file}; build it anew, or take it away"
            )
        self._write_index(file, listing)

    def _write_index(self, file: RemoteFile, listing: Listing) -> None:
        write_index(self.path(file), listing, 0, str(file))

    def open(self, file: RemoteFile) -> int:
        """Descriptor of a shard, which stays in the cache until it is closed; downloads it if need be.

        Whoever holds one closes it before opening another: waiting for room must not keep others from it.
        Raises ShardError.
        """
        path = self.path(file)
        for _ in range(100):
            try:
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(file)
                continue
            fcntl.flock(number, fcntl.LOCK_SH)
            status = os.fstat(number)
            if status.st_nlink and status.st_size == file.size:
                return number
            os.close(number)
            if status.st_nlink:
                raise ShardError(f"{path}: {status.st_size} bytes, but {file} has {file.size}; delete it")
        raise ShardError(f"{file}: others push it out of {self.folder} at once; raise data.cache_gib")

    def fetch(
        self,
        file: RemoteFile,
        *,
        stop: threading.Event | None = None,
        keep: Callable[[], Collection[Path]] = nothing_to_keep,
        wait: bool = True,
    ) -> bool:
        """Have a shard in the cache, without pushing out what `keep` names.

        False, if not `wait`, where another process downloads it or there is no room now. Raises ShardError,
        and Stopped once `stop` is set.
        """
        path = self.path(file)
        with _lock(self.folder / "locks" / path.stem, wait) as locked:
            if not locked:
                return False
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return True
            partial = path.with_suffix(".partial")
            if not self._take_room(file, partial, keep, wait):
                return False
            try:
                with open(partial, "r+b") as out:
                    download(file, out, self.access, stop)
                    out.flush()
                    os.fsync(out.fileno())
                self._verify(file, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def _verify(self, file: RemoteFile, partial: Path) -> None:
        """Refuse a tar with members that are not allowed, or unlike its index, which is made if missing."""
        found, index = scan(partial, str(file)), self.path(file).with_suffix(".idx")
        if not index.exists():
            self._write_index(file, found)
        elif _read_index(index, file) != found:
            index.unlink(missing_ok=True)
            raise ShardError(
                f"{file}: {shown(_index_url(file.url))} does not describe it; build that index anew, or take "
                "it away"
            )

    def touch(self, files: Collection[Path]) -> None:
        """Count these as used now, those that are there."""
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    def _take_room(
        self, file: RemoteFile, partial: Path, keep: Callable[[], Collection[Path]], wait: bool
    ) -> bool:
        """Make the partial file at its full size, which counts against the bound from then on."""
        deadline = time.monotonic() + MAX_ROOM_SECONDS
        while True:
            with _lock(self.folder / "locks" / "room", True):
                partial.unlink(missing_ok=True)
                if self._evict(file.size, keep()):
                    with open(partial, "wb") as out:
                        out.truncate(file.size)
                    return True
            if not wait:
                return False
            if time.monotonic() > deadline:
                raise ShardError(
                    f"{file}: no room in {self.folder} for {MAX_ROOM_SECONDS:.0f} s, all of it is in use; "
                    "raise data.cache_gib"
                )
            time.sleep(0.1)

    def _evict(self, needed: int, keep: Collection[Path]) -> bool:
        """Delete the least recently used tars until there is room; False where that is not possible."""
        used, tars = 0, []
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if entry.name.startswith("."):  # an index that is being written
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".partial" and not self._is_stale(path):
                    used += entry.stat().st_size
                elif path.suffix == ".tar":
                    used += entry.stat().st_size
                    tars.append((entry.stat().st_mtime_ns, entry.stat().st_size, path))
        for _, size, path in sorted(tars):
            if used + needed <= self.bound_bytes:
                break
            if path not in keep and _delete_unread(path):
                used -= size
        return used + needed <= self.bound_bytes

    def _is_stale(self, partial: Path) -> bool:
        """Whether the process that wrote it has ended; it is deleted then."""
        with _lock(self.folder / "locks" / partial.stem, False) as locked:
            if locked:
                partial.unlink(missing_ok=True)
            return locked


def _read_index(index: Path, file: RemoteFile) -> Listing:
    try:
        return parse_index(index.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError) as error:
        raise ShardError(f"{index}, the index of {file}, cannot be used ({error}); delete it") from error


def _index_url(url: str) -> str:
    place, mark, query = url.partition("?")
    return place.removesuffix(".tar") + ".idx" + mark + query


def _delete_unread(path: Path) -> bool:
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(number)
    return True


@contextlib.contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock between processes (and threads); False where somebody else holds it and we do not wait."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(number)
