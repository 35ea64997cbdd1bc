"""Embeddings of a whole set on disk: parts of fixed stretches of samples, each whole or not there at all.

DIR/set.json says of what and by what they are; DIR/part-00000.npz (or .parquet) and so on hold keys, shards,
captions and unit embeddings; DIR/part-00000.unreadable.jsonl names the samples of that stretch that could not
be read. A part is written aside and renamed, so that the work can be killed at any moment: the next call
makes the missing parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from miles_fast.data.batches import Batch, Quarantine
from miles_fast.data.clips import BadSample
from miles_fast.data.loader import EvaluationLoader
from miles_fast.export.encoder import VideoTextEncoder
from miles_fast.files import whole_file, write_whole
from miles_fast.models.dual_encoder import unit

FORMAT = "miles_fast embeddings/1"
Layout = Literal["npz", "parquet"]
_COLUMNS = ("keys", "shards", "captions", "videos", "texts")


@dataclass(frozen=True, kw_only=True)
class SetDescription:
    """What a folder of embeddings holds: two calls that differ in any of it do not mix."""

    model: str
    fingerprint: str
    shards: list[str]
    samples: int
    frames: int
    caption_tokens: int
    dtype: str
    layout: Layout
    part_size: int
    format: str = FORMAT

    @property
    def num_parts(self) -> int:
        return -(-self.samples // self.part_size)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSet:
    """All parts of a folder: N keys, the shards they are in, captions, unit embeddings (N, E) float32."""

    description: SetDescription
    keys: list[str]
    shards: list[str]
    captions: list[str]
    videos: np.ndarray
    texts: np.ndarray
    unreadable: list[dict[str, Any]]


def fingerprint(model: torch.nn.Module) -> str:
    """Sixteen hex digits of the weights, by name and value; take it before a change of dtype."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def embed_set(
    model: VideoTextEncoder, loader: EvaluationLoader, folder: Path, description: SetDescription
) -> Iterator[int]:
    """Write the parts that are missing; yields how many samples are done, after each part.

    Raises ValueError when the folder holds embeddings of something else, naming what differs, and when a
    package that the layout needs is missing.
    """
    if description.layout == "parquet":
        _pyarrow()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, description)
    size, part = description.part_size, 0
    while part < description.num_parts and _part(folder, description, part).is_file():
        part += 1
    if part:
        yield min(part * size, description.samples)
    if part == description.num_parts:
        return
    quarantine = _Listed()
    rows: list[Row] = []
    coming = embedded_batches(model, loader, quarantine, range(part * size, description.samples))
    for numbers, _, videos, texts in coming:
        for row in zip(numbers, videos.numpy(), texts.numpy(), strict=True):
            while row[0] >= (part + 1) * size:
                _write_part(folder, description, part, rows, loader, quarantine)
                rows, part = [], part + 1
                yield part * size
            rows.append(row)
    while part < description.num_parts:
        _write_part(folder, description, part, rows, loader, quarantine)
        rows, part = [], part + 1
        yield min(part * size, description.samples)


@torch.inference_mode()
def embedded_batches(
    model: VideoTextEncoder, loader: EvaluationLoader, quarantine: Quarantine, samples: range
) -> Iterator[tuple[list[int], Batch, Tensor, Tensor]]:
    """Batches in order with their samples' numbers and unit embeddings (B, E) of videos and captions."""
    number = samples.start
    for batch in loader.batches(quarantine, samples):
        numbers = []
        for key in batch.keys:
            while loader.shards[number].key != key:  # batches are in order, less what is unreadable
                number += 1
            numbers.append(number)
            number += 1
        videos = unit(model.embed_video(batch.video_BTCHW))
        texts = unit(model.embed_text(batch.token_ids_BL, batch.attention_BL))
        yield numbers, batch, videos.cpu(), texts.cpu()


def read_set(folder: str | Path) -> EmbeddingSet:
    """All of a finished folder. Raises ValueError naming what is missing."""
    folder = Path(folder)
    description = _read_description(folder)
    missing = [n for n in range(description.num_parts) if not _part(folder, description, n).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {description.num_parts} parts are missing, the first is "
            f"{_part(folder, description, missing[0]).name}; call launch/embed.py again, which goes on there"
        )
    parts = [_read_part(_part(folder, description, number)) for number in range(description.num_parts)]
    parts = [part for part in parts if len(part["keys"])]
    if not parts:
        raise ValueError(f"{folder}: none of its {description.samples} samples could be read")
    unreadable = [
        json.loads(line)
        for path in sorted(folder.glob("part-*.unreadable.jsonl"))
        for line in path.read_text().splitlines()
    ]

    def column(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    return EmbeddingSet(
        description=description,
        keys=column("keys").tolist(),
        shards=column("shards").tolist(),
        captions=column("captions").tolist(),
        videos=column("videos"),
        texts=column("texts"),
        unreadable=unreadable,
    )


Row = tuple[int, np.ndarray, np.ndarray]  # the sample's number, its video's and its caption's embedding


class _Listed(Quarantine):
    """Keeps what is said of every bad sample."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found: dict[tuple[str, str], BadSample] = {}

    def add(self, bad: list[BadSample]) -> None:
        super().add(bad)
        self.found |= {(sample.shard, sample.key): sample for sample in bad}


def _write_part(
    folder: Path,
    description: SetDescription,
    part: int,
    rows: list[Row],
    loader: EvaluationLoader,
    quarantine: _Listed,
) -> None:
    place, shards = _part(folder, description, part), loader.shards
    stretch = range(
        part * description.part_size, min((part + 1) * description.part_size, description.samples)
    )
    bad = [shards[number] for number in sorted({*stretch} - {row[0] for row in rows})]
    lines = [json.dumps(asdict(quarantine.found[str(sample.shard), sample.key])) + "\n" for sample in bad]
    if lines:
        write_whole(place.with_suffix(".unreadable.jsonl"), "".join(lines))
    samples = [shards[row[0]] for row in rows]
    empty = np.zeros((0, 0), np.float32)
    columns = {
        "keys": np.array([sample.key for sample in samples], dtype=np.str_),
        "shards": np.array([str(sample.shard) for sample in samples], dtype=np.str_),
        "captions": np.array([sample.captions()[0] for sample in samples], dtype=np.str_),
        "videos": np.stack([row[1] for row in rows]) if rows else empty,
        "texts": np.stack([row[2] for row in rows]) if rows else empty,
    }
    with whole_file(place) as partial:
        if description.layout == "parquet":
            pyarrow, parquet = _pyarrow()
            parquet.write_table(
                pyarrow.table({name: list(values) for name, values in columns.items()}), partial
            )
        else:
            with open(partial, "wb") as file:
                np.savez(file, **columns)


def _read_part(place: Path) -> dict[str, np.ndarray]:
    try:
        if place.suffix == ".parquet":
            _, parquet = _pyarrow()
            columns = parquet.read_table(place).to_pydict()
            found = {name: np.array(columns[name]) for name in _COLUMNS}
        else:
            with np.load(place, allow_pickle=False) as file:
                found = {name: file[name] for name in _COLUMNS}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{place}: cannot be read ({error}); delete it and call launch/embed.py again"
        ) from error
    return found


def _part(folder: Path, description: SetDescription, number: int) -> Path:
    return folder / f"part-{number:05d}.{description.layout}"


def _claim(folder: Path, description: SetDescription) -> None:
    """Say what the folder is for, or check that it is for the same."""
    place = folder / "set.json"
    if not place.is_file():
        write_whole(place, json.dumps(asdict(description), indent=2) + "\n")
        return
    there, wanted = asdict(_read_description(folder)), asdict(description)
    there.pop("model"), wanted.pop("model")  # the weights' fingerprint tells, not the place
    differing = [
        f"{name}: {there[name]!r} -> {wanted[name]!r}" for name in wanted if there[name] != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"{place}: the embeddings there are of something else ({'; '.join(differing)[:500]}); "
            "name another --output, or delete the folder"
        )


def _read_description(folder: Path) -> SetDescription:
    place = folder / "set.json"
    try:
        return SetDescription(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{place}: cannot be read ({error}); name a folder that launch/embed.py wrote"
        ) from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "parquet needs pyarrow: pip install 'miles-fast[search]', or use --format npz"
        ) from error
    return pyarrow, pyarrow.parquet
