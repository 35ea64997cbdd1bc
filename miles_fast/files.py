"""Files and folders that are whole or not there at all, and mappings that lose no key."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write text aside, flush it to the disk and rename it into place. Raises OSError, `path` untouched."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which is flushed to the disk and renamed to `path` when the block ends well.

    After an error `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names that a folder holds. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(folder: Path, *, spare_others: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write to, which takes the place of `folder` when the block ends well.

    After an error `folder` is as it was; an OSError then says so. With `spare_others` a `folder` that holds
    anything under a name that was not written again is such an error: a ValueError naming the first.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if spare_others:
            _check_covered(folder, partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder}: cannot be written ({error.strerror or error}); nothing was changed"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_covered(folder: Path, successor: Path) -> None:
    """Raise ValueError when a folder holds what its successor does not, at any depth."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not os.path.lexists(successor / name):
            raise ValueError(f"{folder} holds {name}, which is not ours and would be lost; name a new folder")


def unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The dict of a mapping in a file, as json's `object_pairs_hook`.

    Raises ValueError for a key that stands there twice, of which the first would be lost unsaid.
    """
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice; write it once")
        found[key] = value
    return found
