"""Which clips a folder holds and what is said of them: caption files beside video files."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from miles_fast.data.caption_files import ClipListError, read_captions
from miles_fast.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

__all__ = ["ClipListError", "ListedClip", "list_clips"]


@dataclass(frozen=True, kw_only=True)
class ListedClip:
    """One clip as its caption file names it; `file` is the path found in the folder, or None and why not.

    `listed` is the entry's text, `name` a path.
    """

    listed: str
    name: str
    file: str | None
    problem: str
    captions: tuple[str, ...]


def list_clips(folder: Path, captions_file: Path, caption_column: str | None = None) -> list[ListedClip]:
    """Clips of one folder in the order of the caption file (its forms: `read_captions`).

    A name may lack its folder and its extension as long as it is unique. Raises ClipListError.
    """
    listed = read_captions(captions_file, caption_column)
    files = _files(folder)
    return [_find(folder, names, said, files) for names, said in listed.items()]


def _files(folder: Path) -> dict[str, list[str]]:
    """Relative paths of the clips below the folder, by path and by name, each also without extension."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, dot, extension = name.rpartition(".")
            if not dot or extension.lower() not in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
                continue
            path = os.path.relpath(os.path.join(place, name), folder)
            for key in dict.fromkeys((path, os.path.splitext(path)[0], name, stem)):
                found[key].append(path)
    return found


def _find(
    folder: Path, names: tuple[str, ...], captions: list[str], files: dict[str, list[str]]
) -> ListedClip:
    tried = [_look(folder, name, files) for name in names]
    file, problem = next((found for found in tried if found[0] is not None), tried[0])
    return ListedClip(
        listed=names[0],
        name=os.path.normpath(names[0]),
        file=file,
        problem=problem,
        captions=tuple(captions),
    )


def _look(folder: Path, name: str, files: dict[str, list[str]]) -> tuple[str | None, str]:
    """The file of that name, or None and why there is none."""
    path = os.path.normpath(name)
    if os.path.isabs(path):
        path = os.path.relpath(path, os.path.abspath(folder))
    if path.split(os.sep)[0] == "..":
        return None, "file outside folder"
    if os.path.isfile(folder / path):  # False too for a name that no file system takes
        return path, ""
    if len(files.get(path, ())) == 1:
        return files[path][0], ""
    return None, "ambiguous file" if files.get(path) else "file missing"
