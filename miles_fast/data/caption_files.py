"""Caption files in the forms that data sets come in: which clip each entry names, and what is said of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from miles_fast.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from miles_fast.files import unique_keys

# `index` goes before `video_id`: MiraData cuts several clips out of one video and names them by their index.
_FILE_COLUMNS = ("file", "path", "video", "videoid", "index", "video_id", "name")
_CAPTION_COLUMNS = ("caption", "captions")
_MEDIA = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS


class ClipListError(ValueError):
    """A caption file cannot be used; the message names it and what to do."""


def read_captions(path: Path, column: str | None = None) -> dict[tuple[str, ...], list[str]]:
    """Captions of each clip, by the names that its file may have (the first one found is it), in file order.

    Read are: csv and tsv whose header has one of file, path, video, videoid, index, video_id, name, and
    `caption` or `captions`; WebVid's csv (videoid, page_dir and, as the caption, name); CC3M's tsv without a
    header (caption, then url or path); MiraData's csv, with one of its caption columns named; json lists of
    {video | file | path | ..., caption: text or list of texts} (MSR-VTT, MSVD), the same in lines (jsonl),
    json objects {file: text or list or {caption: ..., ...}} (Panda-70M), and MSR-VTT's first form
    {sentences: [{video_id, caption}]}.
    `column` names the caption's column or key. Entries of one clip are joined. Raises ClipListError.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for names, said in _entries(path, column):
        known = found.setdefault(names, [])
        known += [caption for caption in said if caption not in known]
    if not found:
        raise ClipListError(f"{path}: names no clips; it needs one row or entry for each clip")
    return found


def _entries(path: Path, column: str | None) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".json", ".jsonl"):
        raise ClipListError(f"{path}: caption files end in .csv, .tsv, .json or .jsonl")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".tsv" and (first := _headless(file)):
                if column is not None:
                    raise ClipListError(
                        f"{path}: has no header ({first!r} comes first): --caption-column {column} has "
                        "nothing to name; leave it out, the first column is the caption"
                    )
                yield from _pairs(path, file)
                return
            if kind.startswith(".json"):
                for number, row in _json_rows(path, file):
                    yield _entry(path, number, row, column)
                return
            # Not strict, a quote that nothing closes would take the rows behind it into its caption.
            table = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
            for number, row in _table_rows(path, table):
                yield _entry(path, number, row, column, header=table.fieldnames)
    except OSError as error:
        raise ClipListError(f"{path}: cannot be read ({error.strerror}); name the caption file") from error
    except UnicodeDecodeError as error:
        raise ClipListError(f"{path}: is not UTF-8 ({error}); convert it with `iconv -t utf-8`") from error


def _headless(file) -> str | None:
    """The first line of a tsv that begins with a caption and an address, not with names of columns."""
    line = file.readline().rstrip("\r\n")
    file.seek(0)
    cells = line.split("\t")
    return line if len(cells) == 2 and _is_address(cells[1]) else None


def _is_address(text: str) -> bool:
    path = PurePosixPath(urlsplit(text).path)
    return "://" in text or "/" in text or path.suffix.lower().lstrip(".") in _MEDIA


def _pairs(path: Path, file) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Rows of caption, tab, address: nothing is quoted in them."""
    for number, line in enumerate(file, start=1):
        cells = line.rstrip("\r\n").split("\t")
        if cells == [""]:
            continue
        if len(cells) != 2 or not cells[1]:
            raise ClipListError(
                f"{path}: line {number} has {len(cells)} columns; without a header each is a caption, a tab "
                "and a url or path"
            )
        address = cells[1].strip()
        if "://" in address:
            names: tuple[str, ...] = (PurePosixPath(unquote(urlsplit(address).path)).name or address,)
        else:
            names = (address,)
        yield names, [cells[0].strip()]


def _table_rows(path: Path, table: csv.DictReader) -> Iterator[tuple[int, object]]:
    kind = path.suffix.lower()[1:]
    separators = "tabs" if kind == "tsv" else "commas"
    # Iterating over the file keeps line separators inside quotes, and millions of rows out of memory.
    try:
        header = table.fieldnames or ()
        if len(header) == 1 and any(mark in header[0] for mark in ";\t,"):
            raise ClipListError(
                f"{path}: the header is one cell, {header[0]!r}: separate cells by {separators}"
            )
        for number, row in enumerate(table, start=1):
            surplus = row.pop(None, [])
            if any(cell.strip() for cell in surplus):
                width = len(header)
                raise ClipListError(
                    f"{path}: line {table.line_num} has {width + len(surplus)} cells, the header {width}: "
                    f"put captions with {separators} in quotes"
                )
            if any(row.values()):  # spreadsheets end in rows of commas
                yield number, row
    except csv.Error as error:
        raise ClipListError(
            f"{path}: line {table.line_num + 1} is not {kind} ({error}); a cell in quotes ends with one, "
            "and writes those inside it twice"
        ) from error


def _json_rows(path: Path, file) -> Iterator[tuple[int | str, object]]:
    try:
        if path.suffix.lower() == ".jsonl":
            rows: object = [json.loads(line, object_pairs_hook=unique_keys) for line in file if line.strip()]
        else:
            rows = json.load(file, object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ClipListError(f"{path}: is not {path.suffix[1:]} ({error})") from error
    if isinstance(rows, dict) and isinstance(rows.get("sentences"), list):
        rows = rows["sentences"]
    if isinstance(rows, list):
        yield from enumerate(rows, start=1)
    elif isinstance(rows, dict):
        for name, said in rows.items():
            if not isinstance(said, (dict, str, list)):
                raise ClipListError(
                    f"{path}: {name!r} holds a {type(said).__name__}; a json object needs {{file: caption}}, "
                    "{file: [caption, ...]} or {file: {caption: ...}}"
                )
            yield name, {**(said if isinstance(said, dict) else {"caption": said}), "file": name}
    else:
        raise ClipListError(f"{path}: holds a {type(rows).__name__}, not a list of {{file, caption}}")


def _entry(
    path: Path, number: int | str, row: object, column: str | None, header: Sequence[str] = ()
) -> tuple[tuple[str, ...], list[str]]:
    """Names and captions of a row of a table with that header, or of an entry of json."""
    named = row if isinstance(row, dict) else {}
    caption_column, file_columns = column, _FILE_COLUMNS
    if column is not None and column not in named:
        raise ClipListError(
            f"{path}: entry {number} has no {column!r} (--caption-column), only {list(named)}"
        )
    if column is None:
        caption_column = next((name for name in _CAPTION_COLUMNS if name in named), None)
        if caption_column is None and {"videoid", "name"} <= named.keys():
            caption_column, file_columns = "name", ("videoid",)
    several = [name for name in named if isinstance(name, str) and name.endswith("caption")]
    if caption_column is None and several:
        raise ClipListError(
            f"{path}: no column is called caption; choose one with `--caption-column {several[0]}`: it has "
            f"{', '.join(several)}"
        )
    columns = [name for name in file_columns if name != caption_column]
    file_column = next((name for name in columns if named.get(name) not in (None, "")), None)
    name = named.get(file_column)
    if not isinstance(name, (str, int)) or (header and caption_column is None):
        found = list(named) if named else type(row).__name__
        raise ClipListError(
            f"{path}: entry {number} needs one of {', '.join(_FILE_COLUMNS)}, and caption (or its name, by "
            f"--caption-column); it has {found}"
        )
    twice = [used for used in (file_column, caption_column) if header.count(used) > 1]
    if twice:
        raise ClipListError(
            f"{path}: the header names {twice[0]!r} {header.count(twice[0])} times, and only one is read: "
            "rename or remove the others"
        )
    said = named.get(caption_column)
    captions = [
        text.strip() for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)
    ]
    folder = named.get("page_dir")
    names = (f"{folder}/{name}", str(name)) if isinstance(folder, str) and folder else (str(name),)
    return names, captions
