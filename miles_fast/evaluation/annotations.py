"""Annotation files of the benchmarks in their own formats: captions by video, classes, splits."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, TextIO

Captions = dict[str, list[str]]  # by video name, in the file's order


def caption_list(path: Path) -> Captions:
    """`[{"video": "video7010.mp4", "caption": "..." or ["...", ...]}, ...]`, one entry a video."""
    found: Captions = {}
    for number, entry in enumerate(_list(path), start=1):
        name, said = _field(path, number, entry, "video"), entry.get("caption")
        captions = said if isinstance(said, list) else [said]
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise ValueError(f"{path}: entry {number} ({name}): caption is empty; every video needs one")
        if name in found:
            raise ValueError(f"{path}: {name} is there twice; a video has one entry with all its captions")
        found[name] = captions
    return found


def msrvtt(path: Path, split: str | None = None) -> Captions:
    """MSR-VTT's `{"videos": [{video_id, split}], "sentences": [{video_id, caption}]}`, or a list of captions.

    Only the videos of `split` (train, validate, test), all of them without one.
    """
    tree = _json(path)
    if isinstance(tree, list):
        return caption_list(path)
    if not isinstance(tree, dict) or not all(isinstance(tree.get(k), list) for k in ("videos", "sentences")):
        raise ValueError(f"{path}: MSR-VTT's json has the keys videos and sentences, lists both")
    found: Captions = {}
    for number, video in enumerate(tree["videos"], start=1):
        name = _field(path, number, video, "video_id")
        if name in found:
            raise ValueError(f"{path}: video {name} is listed twice")
        found[name] = []
    for number, sentence in enumerate(tree["sentences"], start=1):
        name = _field(path, number, sentence, "video_id")
        if name not in found:
            raise ValueError(f"{path}: sentence {number} is of {name}, which is not among the videos")
        found[name].append(_field(path, number, sentence, "caption"))
    wanted = [v["video_id"] for v in tree["videos"] if split is None or v.get("split") == split]
    return _complete(path, {name: found[name] for name in wanted})


def msrvtt_jsfusion(path: Path) -> Captions:
    """The 1K-A csv: key, vid_key, video_id, sentence; one row a video."""
    found: Captions = {}
    for number, row in _rows(path, ("video_id", "sentence")):
        _refuse_doubled(path, number, row["video_id"], found)
        found[row["video_id"]] = [row["sentence"]]
    return found


def msvd(path: Path) -> Captions:
    """`AllVideoDescriptions.txt`: lines of a clip's name (id_start_end), a space, a caption; # comments."""
    found: Captions = {}
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        name, _, caption = line.partition(" ")
        if not re.fullmatch(r".{11}_\d+_\d+", name) or not caption.strip():
            raise ValueError(f"{path}: line {number} is not `id_start_end caption`: {line[:60]!r}")
        found.setdefault(name, []).append(caption.strip())
    return found


def names(path: Path) -> list[str]:
    """A split file of one name a line."""
    found: dict[str, int] = {}
    for number, line in _lines(path):
        name = line.split(",")[0].strip()
        _refuse_doubled(path, number, name, found)
        found[name] = number
    return list(found)


def only(captions: Captions, wanted: list[str], path: Path) -> Captions:
    """The captions of a split. Raises ValueError for names of it that have none."""
    missing = [name for name in wanted if name not in captions]
    if missing:
        raise ValueError(f"{path}: no captions for {len(missing)} videos of the split: {missing[:5]}")
    return {name: captions[name] for name in wanted}


def lsmdc(path: Path) -> Captions:
    """LSMDC16's csv: six columns parted by tabs, the clip's name first and the sentence last."""
    found: Captions = {}
    for number, line in _lines(path):
        cells = line.split("\t")
        if len(cells) != 6:
            raise ValueError(f"{path}: line {number} has {len(cells)} columns parted by tabs, not 6")
        found.setdefault(cells[0], []).append(cells[5].strip())
    return _complete(path, found)


def didemo(path: Path) -> Captions:
    """DiDeMo's json, `[{"video", "description", ...}]`: a paragraph a video, its sentences in file order."""
    found: Captions = {}
    for number, entry in enumerate(_list(path), start=1):
        said = _field(path, number, entry, "description").strip()
        found.setdefault(_field(path, number, entry, "video"), []).append(said)
    return {name: [" ".join(said)] for name, said in found.items()}


def ucf101_classes(path: Path) -> list[str]:
    """`classInd.txt`: lines of a number from 1 on and a class name."""
    classes = []
    for number, line in _lines(path):
        index, _, name = line.partition(" ")
        if not index.isdigit() or int(index) != len(classes) + 1 or not name:
            raise ValueError(f"{path}: line {number} is not `{len(classes) + 1} ClassName`: {line!r}")
        classes.append(name.strip())
    return refuse_one_class(path, classes)


def ucf101_split(path: Path, classes: list[str]) -> dict[str, int]:
    """`testlist01.txt` (Class/video.avi) or `trainlist01.txt` (with the class's number behind it)."""
    found: dict[str, int] = {}
    for number, line in _lines(path):
        name, _, index = line.partition(" ")
        folder = name.partition("/")[0]
        if folder not in classes:
            raise ValueError(f"{path}: line {number}: {folder!r} is not a class of classInd.txt")
        label = classes.index(folder)
        _refuse_doubled(path, number, name, found)
        if index and index != str(label + 1):
            raise ValueError(
                f"{path}: line {number}: {name} has class {index}, classInd.txt says {label + 1}"
            )
        found[name] = label
    return found


def hmdb51_split(files: list[Path], part: str) -> tuple[dict[str, int], list[str]]:
    """HMDB51's `CLASS_test_splitN.txt`: names with 1 (train), 2 (test) or 0 (unused); labels and classes."""
    wanted = {"train": "1", "test": "2"}[part]
    found: dict[str, int] = {}
    classes = []
    for label, path in enumerate(files):
        classes.append(path.name.partition("_test_split")[0])
        for number, line in _lines(path):
            name, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2") or not name:
                raise ValueError(f"{path}: line {number} is not `video.avi 0|1|2`: {line!r}")
            _refuse_doubled(path, number, name.strip(), found)
            if use == wanted:
                found[name.strip()] = label
    return found, classes


def kinetics(path: Path) -> tuple[dict[str, int], list[str]]:
    """Kinetics' csv (label, youtube_id, time_start, time_end, split): labels by `id_start_end`, classes."""
    rows: dict[str, str] = {}
    for number, row in _rows(path, ("label", "youtube_id", "time_start", "time_end")):
        try:
            start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            raise ValueError(f"{path}: line {number}: times are not numbers: {row}") from None
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        _refuse_doubled(path, number, name, rows)
        rows[name] = row["label"].strip('"')
    classes = refuse_one_class(path, sorted(set(rows.values())))
    return {name: classes.index(label) for name, label in rows.items()}, classes


def ssv2_templates(path: Path, classes: list[str]) -> dict[str, int]:
    """SSV2's validation json, `[{"id", "label", "template", ...}]`: its template's number by id."""
    found: dict[str, int] = {}
    numbers = {name: number for number, name in enumerate(classes)}
    for number, entry in enumerate(_list(path), start=1):
        name = _field(path, number, entry, "id")
        template = without_brackets(_field(path, number, entry, "template"))
        if template not in numbers:
            raise ValueError(f"{path}: entry {number}: {template!r} is not among the labels")
        if name in found:
            raise ValueError(f"{path}: id {name} is there twice")
        found[name] = numbers[template]
    return found


def ssv2_labels(path: Path) -> list[str]:
    """SSV2's labels json, {template: number as text}: the templates in the order of their numbers."""
    tree = _json(path)
    numbers = set(map(str, tree.values())) if isinstance(tree, dict) else set()
    if not isinstance(tree, dict) or numbers != set(map(str, range(len(tree)))):
        raise ValueError(f"{path}: expected {{template: number}} with the numbers from 0 on")
    return refuse_one_class(
        path, [without_brackets(name) for name in sorted(tree, key=lambda n: int(tree[n]))]
    )


def choices(path: Path) -> dict[str, tuple[list[str], int]]:
    """Lines of `{"clip_name", "options": [...], "answer": number}`: options and the right one, by clip."""
    found: dict[str, tuple[list[str], int]] = {}
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            name, options, answer = entry["clip_name"], entry["options"], int(entry["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} needs clip_name, options, answer ({error!r})") from None
        if not isinstance(options, list) or not all(isinstance(text, str) and text for text in options):
            raise ValueError(f"{path}: line {number}: options must be texts: {str(options)[:60]}")
        if len(options) < 2 or not 0 <= answer < len(options):
            raise ValueError(f"{path}: line {number}: answer {answer} of {len(options)} options")
        _refuse_doubled(path, number, name, found)
        found[name] = options, answer
    return found


def without_brackets(template: str) -> str:
    """'Pushing [something] from left to right' without its brackets."""
    return template.replace("[", "").replace("]", "")


def refuse_one_class(path: Path, classes: list[str]) -> list[str]:
    """The classes. Raises ValueError for fewer than two: any model would be right."""
    if len(classes) < 2:
        raise ValueError(f"{path}: holds {len(classes)} class: {classes}; recognition needs at least two")
    return classes


def _complete(path: Path, captions: Captions) -> Captions:
    for name, said in captions.items():
        if not said or not all(said):
            raise ValueError(f"{path}: video {name} has no caption or an empty one")
    return captions


def _refuse_doubled(path: Path, number: int, name: str, found: Container[str]) -> None:
    if name in found:
        raise ValueError(f"{path}: line {number}: {name} is there twice")


@contextlib.contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); convert it with `iconv -t utf-8`") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a csv with a header. Raises ValueError where a needed cell is empty."""
    try:
        with _opened(path, newline="") as file:
            reader = csv.DictReader(file)
            if not set(needed) <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: the header is {reader.fieldnames}; it needs {', '.join(needed)}")
            for row in reader:
                cells = {key: (row[key] or "").strip() for key in needed}
                if not all(cells.values()):
                    raise ValueError(f"{path}: line {reader.line_num} needs {', '.join(needed)}: {cells}")
                yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}: is not csv ({error}); download it again") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: is not json ({error}); download it again") from error


def _list(path: Path) -> list[Any]:
    tree = _json(path)
    if not isinstance(tree, list) or not tree:
        raise ValueError(f"{path}: expected a list of entries, found {type(tree).__name__}")
    return tree


def _field(path: Path, number: int, entry: Any, key: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str | int) or value == "":
        raise ValueError(f"{path}: entry {number} has no {key}: {str(entry)[:80]}")
    return str(value)
