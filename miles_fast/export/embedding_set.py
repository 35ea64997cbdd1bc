"""Embeddings of a whole set on disk: parts of fixed stretches of samples, each whole or not there at all.

DIR/set.json says of what and by what they are; DIR/part-00000.npz (or .parquet) and so on hold keys, shards,
captions and unit embeddings; DIR/part-00000.unreadable.jsonl names the samples of that stretch that could not
be read. A part is written aside and renamed, so that the work can be killed at any moment: the next call
makes the missing parts.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from miles_fast.data.batches import Batch, Quarantine
from miles_fast.data.clips import BadSample
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.shards import ShardSet
from miles_fast.evaluation.host_copies import on_host
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample by its number, as it will stand in a part."""

    number: int
    caption: str
    video: np.ndarray
    text: np.ndarray


def embed_set(
    model: VideoTextEncoder, loader: EvaluationLoader, folder: Path, description: SetDescription
) -> Iterator[int]:
    """Write the parts that are missing, each beside the encoding of the next.

    Yields how many samples are encoded: what an earlier call has left, then after each batch. Raises
    ValueError when the folder holds embeddings of something else, naming what differs, and when a package
    that the layout needs is missing.
    """
    if description.layout == "parquet":
        _pyarrow()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, description)
    size, part = description.part_size, 0
    while part < description.num_parts and _part(folder, description, part).is_file():
        part += 1
    yield min(part * size, description.samples)
    if part == description.num_parts:
        return
    quarantine = Listed()
    rows: list[Row] = []
    writing: deque[Future[None]] = deque()
    samples = range(part * size, description.samples)
    # The executor is left last: parts on their way reach the disk, whatever ends the encoding.
    with (
        ThreadPoolExecutor(1, "parts") as writer,
        contextlib.closing(embedded_batches(model, loader, quarantine, samples)) as batches,
    ):

        def write_part() -> None:
            stretch = range(part * size, min((part + 1) * size, description.samples))
            ready = [row for row in rows if row.number < stretch.stop]
            del rows[: len(ready)]
            place = _part(folder, description, part)
            writing.append(writer.submit(_write_part, place, stretch, ready, loader.shards, quarantine))
            while len(writing) > 1:  # no more parts in memory than the one that waits for the disk
                writing.popleft().result()

        for numbers, batch, videos, texts in batches:
            columns = zip(numbers, batch.captions, videos.numpy(), texts.numpy(), strict=True)
            rows += [Row(number=n, caption=said, video=v, text=t) for n, said, v, t in columns]
            while numbers[-1] >= (part + 1) * size:
                write_part()
                part += 1
            yield numbers[-1] + 1
        while part < description.num_parts:
            write_part()
            part += 1
        while writing:
            writing.popleft().result()
    yield description.samples


def embedded_batches(
    model: VideoTextEncoder, loader: EvaluationLoader, quarantine: Listed, samples: range
) -> Generator[tuple[list[int], Batch, Tensor, Tensor], None, None]:
    """Batches in order with their samples' numbers and unit embeddings (B, E) of videos and captions.

    The embeddings are on the CPU, the batch on the device; close it when done.
    """

    @torch.inference_mode()
    def embed() -> Generator[tuple[tuple[list[int], Batch], Tensor], None, None]:
        number = samples.start
        with contextlib.closing(loader.batches(quarantine, samples)) as batches:
            for batch in batches:
                numbers = []
                for key in batch.keys:
                    # Batches are in order, less what is unreadable, whose key another shard may have, too.
                    while (sample := loader.shards[number]).key != key or (
                        (str(sample.shard), key) in quarantine.found
                    ):
                        number += 1
                    numbers.append(number)
                    number += 1
                whole = _filled(batch, loader.batch)
                texts = unit(model.embed_text(whole.token_ids_BL, whole.attention_BL))
                videos = unit(model.embed_video(whole.video_BTCHW))
                yield (numbers, batch), torch.stack([videos, texts])[:, : len(numbers)]

    with contextlib.closing(embed()) as found:
        for (numbers, batch), (videos, texts) in on_host(found):
            yield numbers, batch, videos, texts


def _filled(batch: Batch, size: int) -> Batch:
    """A batch that lost clips, filled up on a GPU: compiled layers take clips of one number."""
    if not batch.video_BTCHW.is_cuda or len(batch.keys) == size:
        return batch
    rows = torch.arange(size, device=batch.video_BTCHW.device).clamp(max=len(batch.keys) - 1)
    tensors = {name: getattr(batch, name)[rows] for name in ("video_BTCHW", "token_ids_BL", "attention_BL")}
    return replace(batch, **tensors)


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

    def column(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    return EmbeddingSet(
        description=description,
        keys=column("keys").tolist(),
        shards=column("shards").tolist(),
        captions=column("captions").tolist(),
        videos=column("videos"),
        texts=column("texts"),
        unreadable=unreadable_samples(folder),
    )


def unreadable_samples(folder: Path) -> list[dict[str, Any]]:
    """Key, shard, cause and message of the samples that the parts of a folder had to leave out."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("part-*.unreadable.jsonl"))
        for line in path.read_text().splitlines()
    ]


class Listed(Quarantine):
    """Keeps what is said of every bad sample, by shard and key."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found: dict[tuple[str, str], BadSample] = {}

    def add(self, bad: list[BadSample]) -> None:
        super().add(bad)
        self.found |= {(sample.shard, sample.key): sample for sample in bad}


def _write_part(place: Path, stretch: range, rows: list[Row], shards: ShardSet, quarantine: Listed) -> None:
    """Write the samples of a stretch that could be read, and beside them the list of the others."""
    bad = [shards[number] for number in sorted({*stretch} - {row.number for row in rows})]
    lines = [json.dumps(asdict(quarantine.found[str(sample.shard), sample.key])) + "\n" for sample in bad]
    if lines:
        write_whole(place.with_suffix(".unreadable.jsonl"), "".join(lines))
    samples = [shards[row.number] for row in rows]
    empty = np.zeros((0, 0), np.float32)
    columns = {
        "keys": np.array([sample.key for sample in samples], dtype=np.str_),
        "shards": np.array([str(sample.shard) for sample in samples], dtype=np.str_),
        "captions": np.array([row.caption for row in rows], dtype=np.str_),
        "videos": np.stack([row.video for row in rows]) if rows else empty,
        "texts": np.stack([row.text for row in rows]) if rows else empty,
    }
    with whole_file(place) as partial:
        if place.suffix == ".parquet":
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
        if (folder / "summary.json").exists():
            raise ValueError(f"{folder} holds another program's summary.json: name another --output")
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
