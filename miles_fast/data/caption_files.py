"""A folder of media with a caption file (csv, tsv or json) to a list of samples."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from miles_fast.data.shards import ShardError

FILE_COLUMNS = ("file", "path", "video", "name", "videoid", "filename")
CAPTION_COLUMNS = ("caption", "captions", "text", "name")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One entry of a caption file: its name there, its path, its key, its captions, and what is wrong with it."""

    name: str
    path: Path
    key: str
    captions: tuple[str, ...]
    problem: str | None = None


def list_folder(folder: Path, caption_file: Path) -> list[Listed]:
    """Entries of `caption_file` whose media lie under `folder`, in the file's order.

    csv and tsv need a header with a file column (file, path, video, videoid ...) and a caption column; json
    is a list of objects with the same names, `caption` a text or a list. An entry without caption is listed,
    to be quarantined. Raises ShardError naming the file, the key and what is known.
    """
    rows = _read_rows(caption_file)
    if not rows:
        raise ShardError(f"{caption_file}: holds no entries")
    name_key = _pick(rows[0], FILE_COLUMNS, caption_file, "file")
    caption_key = next((c for c in CAPTION_COLUMNS if c != name_key and any(c in row for row in rows)), None)
    if caption_key is None:
        raise ShardError(f"{caption_file}: no caption column; expected one of {CAPTION_COLUMNS}")
    return [_entry(folder, row, name_key, caption_key, caption_file) for row in rows]


def _read_rows(caption_file: Path) -> list[dict]:
    try:
        text = caption_file.read_text(encoding="utf-8-sig")
        if caption_file.suffix.lower() in (".csv", ".tsv"):
            delimiter = "\t" if caption_file.suffix.lower() == ".tsv" else ","
            return list(csv.DictReader(text.splitlines(), delimiter=delimiter))
        rows = json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise ShardError(f"{caption_file}: cannot be read as csv, tsv or json ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ShardError(f"{caption_file}: expected a list of objects with `file` and `caption`")
    return rows


def _pick(row: dict, columns: tuple[str, ...], caption_file: Path, what: str) -> str:
    found = next((column for column in columns if column in row), None)
    if found is None:
        raise ShardError(f"{caption_file}: no {what} column among {sorted(row)}; expected one of {columns}")
    return found


def _entry(folder: Path, row: dict, name_key: str, caption_key: str, caption_file: Path) -> Listed:
    name = str(row.get(name_key) or "")
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"{caption_file}: {name_key} = {name!r} is not a file inside {folder}")
    if not path.suffix:
        path = next(
            (p for p in (path.with_suffix(s) for s in (".mp4", ".webm", ".mkv", ".jpg")) if p.exists()), path
        )
    found = row.get(caption_key)
    captions = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    captions = tuple(text.strip() for text in captions if isinstance(text, str) and text.strip())
    return Listed(
        name=name,
        path=path,
        key=name.rsplit(".", 1)[0].replace(".", "_").replace("/", "_"),
        captions=captions,
        problem=None if captions else "no caption",
    )
