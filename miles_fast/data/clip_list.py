"""Which clips a folder holds and what is said of them: caption files beside video files."""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from miles_fast.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

_FILE_COLUMNS = ("file", "path", "video", "videoid", "video_id", "name")
_CAPTION_COLUMNS = ("caption", "captions")


class ClipListError(ValueError):
    """A caption file cannot be used; the message names it and what to do."""


@dataclass(frozen=True, kw_only=True)
class ListedClip:
    """One clip as its caption file names it; `file` is the path found in the folder, or None and why not."""

    name: str
    file: str | None
    problem: str
    captions: tuple[str, ...]


def list_clips(folder: Path, captions_file: Path) -> list[ListedClip]:
    """Clips of one folder in the order of the caption file; several captions of one clip are joined.

    csv and tsv have a header with one of file, path, video, videoid, name, and `caption`; WebVid's own csv
    (videoid and, as the caption, name) is read as it is. json is a list of {file | path | video | ...: ...,
    caption: text or list of texts}, jsonl the same in lines. A name may lack its folder and its extension as
    long as it is unique.
    """
    captions: dict[str, list[str]] = {}
    for name, said in _entries(captions_file):
        known = captions.setdefault(name, [])
        known += [caption for caption in said if caption not in known]
    if not captions:
        raise ClipListError(f"{captions_file}: names no clips; it needs one row or entry for each clip")
    files = _files(folder)
    return [_find(folder, name, said, files) for name, said in captions.items()]


def _entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ClipListError(f"{path}: cannot be read ({error.strerror}); name the caption file") from error
    except UnicodeDecodeError as error:
        raise ClipListError(f"{path}: is not UTF-8 ({error}); convert it with `iconv -t utf-8`") from error
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        rows: list = list(
            csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if kind == ".tsv" else ",")
        )
    elif kind in (".json", ".jsonl"):
        try:
            rows = (
                json.loads(text)
                if kind == ".json"
                else [json.loads(li) for li in text.splitlines() if li.strip()]
            )
        except (ValueError, RecursionError) as error:
            raise ClipListError(f"{path}: is not {kind[1:]} ({error})") from error
    else:
        raise ClipListError(f"{path}: caption files end in .csv, .tsv, .json or .jsonl")
    if not isinstance(rows, list):
        raise ClipListError(f"{path}: holds a {type(rows).__name__}, not a list of {{file, caption}}")
    for number, row in enumerate(rows, start=1):
        yield _entry(path, number, row)


def _entry(path: Path, number: int, row: object) -> tuple[str, list[str]]:
    named = row if isinstance(row, dict) else {}
    caption = next((named[column] for column in _CAPTION_COLUMNS if column in named), None)
    columns = _FILE_COLUMNS
    if not any(column in named for column in _CAPTION_COLUMNS) and {"videoid", "name"} <= named.keys():
        caption, columns = named["name"], ("videoid",)
    name = next((named[column] for column in columns if named.get(column) not in (None, "")), None)
    if not isinstance(name, (str, int)) or (caption is None and path.suffix.lower() in (".csv", ".tsv")):
        found = list(named) if named else type(row).__name__
        raise ClipListError(
            f"{path}: entry {number} needs one of {', '.join(_FILE_COLUMNS)}, and caption; it has {found}"
        )
    said = caption if isinstance(caption, list) else [caption]
    return str(name), [text.strip() for text in said if isinstance(text, str)]


def _files(folder: Path) -> dict[str, list[str]]:
    """Relative paths of the clips below the folder, by path, by name and by name without extension."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, dot, extension = name.rpartition(".")
            if not dot or extension.lower() not in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
                continue
            path = os.path.relpath(os.path.join(place, name), folder)
            for key in dict.fromkeys((path, name, stem)):
                found[key].append(path)
    return found


def _find(folder: Path, name: str, captions: list[str], files: dict[str, list[str]]) -> ListedClip:
    path = os.path.normpath(name)
    file, problem = None, ""
    if os.path.isabs(path):
        path = os.path.relpath(path, os.path.abspath(folder))
    if path.split(os.sep)[0] == "..":
        problem = "file outside folder"
    elif (folder / path).is_file():
        file = path
    elif len(files.get(path, ())) == 1:
        file = files[path][0]
    else:
        problem = "ambiguous file" if files.get(path) else "file missing"
    return ListedClip(name=name, file=file, problem=problem, captions=tuple(captions))
