"""The index of a tar shard: DALI's own `wds2idx` text, version v1.2, beside the tar.

A header line `v1.2 SAMPLES`, then one line a sample: `extension offset size name` for each of its members. A
sample is a run of regular members with the same path up to the first dot of their basename.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

INDEX_VERSION = "v1.2"
# A member above its limit is no clip, caption or record: it would only fill the memory of a reading process.
MAX_TEXT_BYTES = 16 << 20
MAX_IMAGE_BYTES = 256 << 20
MAX_MEMBER_BYTES = 4 << 30
_LIMITS = {
    **dict.fromkeys(("txt", "json"), MAX_TEXT_BYTES),
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), MAX_IMAGE_BYTES),
}
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


class ShardError(ValueError):
    """A shard or its index cannot be used; the message names the file and what to do."""


_said: set[str] = set()


def say_once(message: str) -> None:
    """Log a warning that this process has not logged yet."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def size_problem(name: str, size: int) -> str | None:
    """What is wrong with a member's size in bytes, None if nothing is."""
    limit = _LIMITS.get(name.rpartition(".")[2].lower(), MAX_MEMBER_BYTES)
    if 0 <= size <= limit:
        return None
    return f"member {name!r} has {size} bytes, the limit of its kind is {limit}"


def _members(tar_path: Path, shown: str) -> Iterator[tuple[str, str, int, int, str]]:
    """(key, extension, offset, size, name) of every regular member that is not hidden, in file order."""
    rewrite = "write the shard again (a partial download is the usual reason)"
    try:
        with tarfile.open(tar_path, "r:") as archive:
            # Python 3.10 looks before the start of an archive that holds nothing.
            while archive.firstmember or archive.offset:
                member = archive.next()
                if member is None:
                    break
                archive.members = []
                problem = size_problem(member.name, member.size)
                if problem:  # a negative size would send the reader back to where it was
                    raise ShardError(f"{shown}: {problem}; leave it out of the shard")
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise ShardError(
                        f"{shown}: member {member.name!r} is a link, device or sparse file; a shard "
                        "may hold regular files only: write it with `tar --dereference --hard-dereference`"
                    )
                name = member.name
                dot = name.find(".", name.rfind("/") + 1)
                key, extension = name[:dot], name[dot + 1 :]
                if not key or key.endswith("/"):
                    continue
                if name.startswith("/") or ".." in name.split("/"):
                    raise ShardError(
                        f"{shown}: member name {name!r} leaves the archive; write the shard again"
                    )
                yield key, extension, member.offset_data, member.size, name
            with open(tar_path, "rb") as file:
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise ShardError(
                        f"{shown}: no end of archive at byte {archive.offset}, it is truncated or "
                        f"damaged; {rewrite}"
                    )
    except ShardError:
        raise
    # Crafted headers make tarfile raise more than its own errors: chains of extended headers, numbers beyond
    # 64 bits, names of a terabyte.
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        remedy = _remedy(tar_path, shown) or rewrite
        raise ShardError(f"{shown}: not a complete, uncompressed tar archive ({reason}); {remedy}") from error


def _remedy(tar_path: Path, shown: str) -> str | None:
    """What to do about a file that was never meant as a plain tar, None if it was."""
    with open(tar_path, "rb") as file:
        start = file.read(8)
    command = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    if command:
        return f"it is compressed: {command} it first"
    name = shown.partition("?")[0]
    if name.endswith(".tar"):
        return None
    return (
        "its name does not end in .tar: shards are tars; of a folder of videos they are written with "
        "`python launch/prepare.py FOLDER --captions FILE --output DIR`"
    )


@dataclass
class Listing:
    """Members of one shard, column by column; `counts` says how many belong to each sample."""

    keys: list[str]
    counts: list[int]
    extensions: list[str]
    offsets: list[int]
    sizes: list[int]
    names: list[str]

    def text(self) -> str:
        members = [
            f"{e} {o} {s} {n}"
            for e, o, s, n in zip(self.extensions, self.offsets, self.sizes, self.names, strict=True)
        ]
        lines, start = [f"{INDEX_VERSION} {len(self.keys)}"], 0
        for count in self.counts:
            lines.append(" ".join(members[start : start + count]))
            start += count
        return "\n".join(lines) + "\n"


def scan(tar_path: Path, shown: str | None = None) -> Listing:
    """Listing of a tar from its headers; `shown` names it in errors. Raises ShardError."""
    shown = shown or str(tar_path)
    listing = Listing([], [], [], [], [], [])
    for key, extension, offset, size, name in _members(tar_path, shown):
        if not listing.keys or listing.keys[-1] != key:
            listing.keys.append(key)
            listing.counts.append(0)
        listing.counts[-1] += 1
        listing.extensions.append(extension)
        listing.offsets.append(offset)
        listing.sizes.append(size)
        listing.names.append(name)
    if not listing.keys:
        raise ShardError(f"{shown}: the shard holds no samples; delete it")
    twice = _first_duplicate(listing.names)
    if twice:
        raise ShardError(
            f"{shown}: member {twice!r} is there twice, and readers disagree on which one counts; "
            "write the shard again"
        )
    return listing


def _first_duplicate(names: list[str]) -> str | None:
    if len(set(names)) == len(names):
        return None
    return next(name for name, count in Counter(names).items() if count > 1)


def parse_index(text: str) -> Listing:
    """The inverse of `Listing.text`. Raises ValueError if the text is not an index of this version."""
    lines = text.removesuffix("\n").split("\n")
    header = lines[0].split()
    if len(header) != 2 or header[0] != INDEX_VERSION:
        raise ValueError(f"its first line is {' '.join(header)[:60]!r}, not '{INDEX_VERSION} SAMPLES'")
    if int(header[1]) != len(lines) - 1 or len(lines) == 1:
        raise ValueError(f"its header promises {header[1]} samples, {len(lines) - 1} follow")
    listing = Listing([], [], [], [], [], [])
    for number, line in enumerate(lines[1:], start=2):
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError(f"line {number} is not a list of `extension offset size name`")
        name = words[3]
        key = name[: name.find(".", name.rfind("/") + 1)]
        wrong = next((n for n in words[3::4] if n.startswith("/") or ".." in n.split("/")), None)
        if not key or wrong is not None:
            raise ValueError(f"line {number}: {wrong or name!r} is no name for a member of a shard")
        listing.keys.append(key)
        listing.counts.append(len(words) // 4)
        listing.extensions += words[0::4]
        listing.offsets += map(int, words[1::4])
        listing.sizes += map(int, words[2::4])
        listing.names += words[3::4]
    if min(listing.offsets) < 0 or min(listing.sizes) < 0:
        raise ValueError("it holds a negative offset or size")
    problem = _first_problem(listing)
    if problem:
        raise ValueError(problem)
    return listing


def _first_problem(listing: Listing) -> str | None:
    """What no tar can have given, of the members that an index names."""
    for name, size in zip(listing.names, listing.sizes, strict=True):
        problem = size_problem(name, size)
        if problem:
            return problem
    twice = _first_duplicate(listing.names)
    if twice:
        return f"it names member {twice!r} twice"
    order = sorted(range(len(listing.names)), key=listing.offsets.__getitem__)
    for one, two in zip(order, order[1:], strict=False):
        if listing.offsets[one] + listing.sizes[one] > listing.offsets[two]:
            return f"members {listing.names[one]!r} and {listing.names[two]!r} overlap"
    return None


def build_index(tar_path: str | Path) -> Path:
    """Write `X.idx` beside `X.tar`, whole or not at all, and return its path.

    Raises ShardError for a file that is no tar, is truncated or empty, or has names the index cannot express,
    and OSError where the folder cannot be written.
    """
    tar_path = Path(tar_path)
    status = tar_path.stat()
    return write_index(tar_path, scan(tar_path), status.st_mtime_ns)


def write_index(tar_path: Path, listing: Listing, tar_time: int, shown: str | None = None) -> Path:
    """Write the index of a tar of that time (ns) as `build_index` does; `shown` names the tar in errors."""
    path = tar_path.with_suffix(".idx")
    spaced = [name for name in listing.names if any(map(str.isspace, name))]
    if spaced:
        raise ShardError(
            f"{shown or tar_path}: the index cannot express white space in a member's name: "
            f"rename {spaced[0]!r}"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_text(listing.text(), encoding="utf-8", errors="surrogateescape")
        if partial.stat().st_mtime_ns < tar_time:  # a tar dated in the future would make its index look stale
            os.utime(partial, ns=(tar_time, tar_time))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_listing(tar_path: Path, missing_index: str) -> Listing:
    """Listing of one shard from its index, which is built when missing and refused when it is another's."""
    path = tar_path.with_suffix(".idx")
    try:
        status = tar_path.stat()
    except OSError as error:
        raise ShardError(
            f"{tar_path}: the shard cannot be read ({error.strerror}); correct the path"
        ) from error
    if tar_path.is_dir():
        raise ShardError(f"{tar_path} is a folder: write '{tar_path}/*.tar'")
    if not path.exists():
        if missing_index != "build":
            raise ShardError(
                f"{tar_path}: its index {path.name} is missing; build it with `wds2idx {tar_path} {path}`"
            )
        listing = scan(tar_path)
        try:
            write_index(tar_path, listing, status.st_mtime_ns)
        except (OSError, ShardError) as error:
            say_once(
                f"indexes of {tar_path.parent} are kept in memory and built again by each process: {error}"
            )
        return listing
    remedy = f"delete {path}, it is rebuilt"
    try:
        listing = parse_index(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise ShardError(f"{path} is not a usable index of {tar_path}: {error}; {remedy}") from error
    end = max(map(int.__add__, listing.offsets, listing.sizes))
    if end > status.st_size:
        raise ShardError(
            f"{path} names bytes up to {end}, but {tar_path} has {status.st_size}: "
            f"if the shard is whole, {remedy}"
        )
    if path.stat().st_mtime_ns < status.st_mtime_ns:  # or both were copied without their times
        if listing != scan(tar_path):
            raise ShardError(f"{path} is older than its shard {tar_path}, and not its index: {remedy}")
        with contextlib.suppress(OSError):  # looked at again by each process where it cannot be dated anew
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    return listing
