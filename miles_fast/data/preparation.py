"""Video tars, or a folder with a caption file, to frame shards: what training reads fastest.

A plan assigns every input sample to one output shard, as a pure function of inputs and options. A shard is
written aside and renamed, with a record of what it kept and dropped, so that an interrupted preparation goes
on where it stopped and the same input gives the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from miles_fast.data.caption_files import Listed, list_folder
from miles_fast.data.sampling import segment_frames
from miles_fast.data.shard_index import build_index
from miles_fast.data.shards import SampleError, ShardSet
from miles_fast.data.videos import read_frames

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


class PreparationError(ValueError):
    """A preparation that cannot go on; finished shards are kept."""


@dataclass(frozen=True, kw_only=True)
class PreparationOptions:
    """`frames` per clip (middles of equal segments), short side in pixels (never enlarged), JPEG quality."""

    frames: int = 8
    short_side: int = 256
    quality: int = 90
    samples_per_shard: int = 512
    limit: int | None = None
    captions: str | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a preparation did; also OUTPUT/summary.json."""

    kept: int
    dropped: dict[str, int]
    shards: int
    bytes: int
    seconds: float
    options: dict


@dataclass(frozen=True, kw_only=True)
class _Job:
    number: int
    output: Path
    plan: str
    options: PreparationOptions
    tars: tuple[Path, ...]
    samples: tuple[int, ...]
    listed: tuple[Listed, ...]


def prepare(
    inputs: Sequence[str | Path], output: Path, options: PreparationOptions, workers: int | None = None
) -> Summary:
    """Prepare tars, or one folder with `options.captions`, into OUTPUT/00000.tar ... with indexes.

    Also writes summary.json and quarantine.jsonl (every dropped sample with its cause). Raises
    PreparationError when OUTPUT holds another plan, when nothing could be kept, or when the disk is full;
    ShardError for bad tars.
    """
    started = time.perf_counter()
    jobs = _plan([Path(path) for path in inputs], output, options)
    records = output / ".records"
    records.mkdir(parents=True, exist_ok=True)
    _claim(output, jobs[0].plan)
    missing = [job for job in jobs if not _finished(job)]
    workers = max(1, min(workers or os.cpu_count() or 1, len(missing)))
    if missing:
        _run(missing, workers, [len(job.samples) + len(job.listed) for job in missing])
    done = [json.loads(_record_path(job).read_text()) for job in jobs]
    dropped = [entry for record in done for entry in record["dropped"]]
    summary = Summary(
        kept=sum(len(record["kept"]) for record in done),
        dropped=dict(Counter(entry["cause"] for entry in dropped)),
        shards=sum(bool(record["kept"]) for record in done),
        bytes=sum(record["bytes"] for record in done),
        seconds=round(time.perf_counter() - started, 3),
        options=asdict(options),
    )
    _write(output / "quarantine.jsonl", "".join(json.dumps(entry) + "\n" for entry in dropped))
    if missing or not (output / "summary.json").exists():
        _write(output / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
    if not summary.kept:
        raise PreparationError(
            f"{output}: none of {len(dropped)} samples could be kept ({summary.dropped}); see quarantine.jsonl there"
        )
    return summary


def _plan(inputs: list[Path], output: Path, options: PreparationOptions) -> list[_Job]:
    listed: list[Listed] = []
    tars: tuple[Path, ...] = ()
    if len(inputs) == 1 and inputs[0].is_dir():
        if options.captions is None:
            raise PreparationError(f"{inputs[0]} is a folder: name its caption file with --captions FILE")
        listed = list_folder(inputs[0], Path(options.captions))
        keys, total = [item.key for item in listed], len(listed)
        facts = [(item.name, item.captions) for item in listed]
    else:
        tars = tuple(inputs)
        shards = ShardSet(tars)
        total = len(shards)
        keys = [_clean(shards.key(sample)) for sample in range(total)]
        facts = [(tar.name, tar.stat().st_size) for tar in tars]
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise PreparationError(
            f"{len(repeated)} keys occur twice in the input, e.g. {repeated[:3]}: make them unique"
        )
    total = min(total, options.limit or total)
    plan = hashlib.sha256(json.dumps([facts, asdict(options)]).encode()).hexdigest()[:16]
    size = options.samples_per_shard
    return [
        _Job(
            number=start // size,
            output=output,
            plan=plan,
            options=options,
            tars=tars,
            samples=tuple(range(start, min(start + size, total))) if tars else (),
            listed=tuple(listed[start : min(start + size, total)]),
        )
        for start in range(0, total, size)
    ]


def _claim(output: Path, plan: str) -> None:
    path = output / ".records" / "plan"
    if path.exists() and path.read_text() != plan:
        raise PreparationError(
            f"{output} holds shards of another preparation (other inputs or options); delete it, or name another "
            "--output"
        )
    _write(path, plan)


def _run(jobs: list[_Job], workers: int, sizes: list[int]) -> None:
    from tqdm import tqdm

    with (
        tqdm(total=sum(sizes), unit="clip", desc="prepare", mininterval=1.0) as bar,
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        futures = {pool.submit(_write_shard, job): size for job, size in zip(jobs, sizes, strict=True)}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future])
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise PreparationError(
                f"{jobs[0].output}: a shard could not be written ({reason}); finished shards are kept, the same "
                "command goes on behind them"
            ) from error


def _write_shard(job: _Job) -> None:
    import webdataset

    tar = _tar_path(job)
    partial = tar.with_suffix(".tar.partial")
    shards = ShardSet(job.tars) if job.tars else None
    kept, dropped = [], []
    try:
        with webdataset.TarWriter(str(partial), encoder=False, mtime=0.0) as writer:
            for item in [*job.samples, *job.listed]:
                try:
                    sample = _prepare_sample(item, shards, job.options)
                except SampleError as error:
                    key = item.key if isinstance(item, Listed) else shards.key(item)
                    source = str(item.path if isinstance(item, Listed) else shards.shard(item))
                    dropped.append(
                        {"key": key, "source": source, "cause": error.cause, "message": str(error)}
                    )
                    continue
                writer.write(sample)
                kept.append(sample["__key__"])
        if kept:
            os.replace(partial, tar)
            build_index(tar)
    finally:
        partial.unlink(missing_ok=True)
    size = tar.stat().st_size if kept else 0
    record = {"plan": job.plan, "kept": kept, "dropped": dropped, "bytes": size}
    _write(_record_path(job), json.dumps(record))


def _prepare_sample(
    item: int | Listed, shards: ShardSet | None, options: PreparationOptions
) -> dict[str, str | bytes]:
    def choose(count: int) -> np.ndarray:
        return segment_frames(count, min(options.frames, count))

    if isinstance(item, Listed):
        if not item.captions:
            raise SampleError(
                f"{item.path}: {item.problem or 'has no caption'}", item.problem or "no caption"
            )
        captions, key, origin = list(item.captions), item.key, {"file": item.name}
        if item.path.suffix.lower() in IMAGES:
            pictures, info = (
                [_open_image(item.path)],
                {"num_frames": 1, "codec": item.path.suffix[1:].lower()},
            )
        else:
            pictures, clip = read_frames(item.path, choose)
            info = asdict(clip)
    else:
        assert shards is not None
        captions, key = shards.captions(item, every=True), _clean(shards.key(item))
        origin = {"shard": shards.shard(item).name, "key": shards.key(item)}
        if shards.layout(item) == "video":
            data = shards.read(item, shards.video_extension(item))
            pictures, clip = read_frames(data, choose, name=shards.describe(item))
            info = asdict(clip)
        else:
            extensions = shards.frame_extensions(item)
            chosen = [extensions[i] for i in choose(len(extensions))]
            pictures = [_open_image(io.BytesIO(shards.read(item, e)), shards.describe(item)) for e in chosen]
            info = {"num_frames": len(extensions), "codec": "images"}
    jpegs, (width, height) = _encode(pictures, options)
    record = {
        "key": key,
        "num_frames": len(jpegs),
        "width": width,
        "height": height,
        "timestamps_seconds": info.pop("timestamps_seconds", [0.0] * len(jpegs)),
        "crc32": [zlib.crc32(jpeg) for jpeg in jpegs],
        "source": {**origin, **info},
    }
    if len(captions) > 1:
        record["captions"] = captions
    frames = {f"{number:02d}.jpg": jpeg for number, jpeg in enumerate(jpegs)}
    return {"__key__": key, **frames, "txt": captions[0].encode(), "json": json.dumps(record).encode()}


def _encode(pictures: list, options: PreparationOptions) -> tuple[list[bytes], tuple[int, int]]:
    from PIL import Image

    jpegs = []
    for picture in pictures:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        scale = options.short_side / min(image.size)
        if scale < 1:
            size = tuple(max(1, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=options.quality)
        jpegs.append(buffer.getvalue())
    return jpegs, image.size


def _open_image(source: Path | io.BytesIO, name: str | None = None):
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"{name or source}: not a readable image ({error})", "not decodable") from error


def _clean(key: str) -> str:
    """WebDataset keys end at the first dot of the file's name, and prepared keys hold no folder."""
    return key.replace(".", "_").replace("/", "_")


def _tar_path(job: _Job) -> Path:
    return job.output / f"{job.number:05d}.tar"


def _record_path(job: _Job) -> Path:
    return job.output / ".records" / f"{job.number:05d}.json"


def _finished(job: _Job) -> bool:
    try:
        record = json.loads(_record_path(job).read_text())
    except (OSError, ValueError):
        return False
    tar = _tar_path(job)
    whole = not record["kept"] or (tar.exists() and tar.with_suffix(".idx").exists())
    return record["plan"] == job.plan and whole


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
