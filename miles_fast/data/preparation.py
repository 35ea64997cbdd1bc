"""Preparation: videos or images with captions -> frame shards, the layout that training reads.

Reads tars in any layout or a folder with a caption file; writes `DIR/00000.tar` (KEY.00.jpg ..., KEY.txt,
KEY.json) with its index, `quarantine.jsonl` and `summary.json`. What goes into which shard is a pure
function of the input list and the options: an interrupted run goes on, equal input gives equal bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from miles_fast.data.clip_frames import encode_clip
from miles_fast.data.clip_sources import FolderSource, TarSource
from miles_fast.data.shards import SampleError, build_index, expand_shards
from miles_fast.data.tone_map import missing_tone_map
from miles_fast.files import write_whole

# Part of the plan: a change of what is written for the same input must not mix with shards written before it.
_FORMAT = 2


class PreparationError(ValueError):
    """Preparation cannot go on; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class PreparationOptions:
    """Frames kept of each clip, their short side in pixels (never enlarged), JPEG quality, clips a shard.

    With `fps`, one frame for every 1 / fps s of the clip, at most `max_frames`, instead of `frames`.
    """

    frames: int = 8
    fps: float | None = None
    max_frames: int = 32
    short_side: int = 256
    quality: int = 90
    samples_per_shard: int = 512
    workers: int | None = None
    limit: int | None = None
    allow_hdr: bool = False

    def __post_init__(self):
        for name in ("frames", "max_frames", "short_side", "samples_per_shard", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PreparationError(f"{name} is {value}; it must be at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise PreparationError(f"fps is {self.fps}; it must be a number above 0")
        if not 1 <= self.quality <= 100:
            raise PreparationError(f"quality is {self.quality}; JPEG quality goes from 1 to 100")

    def planned(self) -> dict:
        """The options that decide what is written; the number of workers does not."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a preparation wrote; also in summary.json. `shards` are the tars, in order."""

    kept: int
    dropped: dict[str, int]
    shards: tuple[Path, ...]
    num_bytes: int
    seconds: float


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    options: PreparationOptions,
    captions: str | Path | None = None,
    caption_column: str | None = None,
) -> Summary:
    """Write frame shards of tars (patterns), or of a folder and its caption file; say what became of them.

    `caption_column` names the caption file's column or key where it is not `caption`.
    Finished shards of an earlier, interrupted call are kept. Raises PreparationError when the output belongs
    to another plan, keys repeat, the disk is full or no sample is usable; ShardError or ClipListError for
    unusable input.
    """
    start = time.monotonic()
    if options.allow_hdr and (lack := missing_tone_map()):
        raise PreparationError(f"HDR videos cannot be mapped: {lack}, or do without --allow-hdr")
    source = _source([str(one) for one in inputs], captions, caption_column)
    output = Path(output)
    num_samples = min(len(source), options.limit or len(source))
    plan = _plan(source, num_samples, options)
    _claim(output, plan)
    ranges = [
        range(first, min(first + options.samples_per_shard, num_samples))
        for first in range(0, num_samples, options.samples_per_shard)
    ]
    records = {
        number: record for number in range(len(ranges)) if (record := _finished(output, number, plan["plan"]))
    }
    missing = {number: samples for number, samples in enumerate(ranges) if number not in records}
    job = _Job(source=source, output=output, options=options, plan=plan["plan"])
    for record in _run(job, missing, num_samples):
        records[record["shard"]] = record
    return _report(output, [records[number] for number in sorted(records)], options, time.monotonic() - start)


def _source(
    inputs: list[str], captions: str | Path | None, caption_column: str | None
) -> TarSource | FolderSource:
    folders = [one for one in inputs if os.path.isdir(one)]
    if folders and (len(inputs) > 1 or captions is None):
        raise PreparationError(
            f"{folders[0]} is a folder: give one folder and `--captions FILE` (csv, tsv, json), "
            "or tars as 'DIR/*.tar'"
        )
    if folders:
        return FolderSource.open(Path(folders[0]), Path(captions), caption_column)
    if captions is not None:
        raise PreparationError(
            f"--captions {captions} goes with a folder of clips; tars carry their captions"
        )
    return TarSource.open(expand_shards(inputs))


def _plan(source: TarSource | FolderSource, num_samples: int, options: PreparationOptions) -> dict:
    planned = [_FORMAT, options.planned(), source.fingerprint()]
    digest = hashlib.sha256(json.dumps(planned, sort_keys=True).encode())
    first: dict[str, int] = {}
    for sample in range(num_samples):
        key = source.key(sample)
        if key in first:
            raise PreparationError(
                f"{source.describe(first[key])} and {source.describe(sample)} have the same key {key!r} "
                "(dots and spaces become _): rename one, or prepare them into separate outputs"
            )
        first[key] = sample
        digest.update(json.dumps([key, source.identity(sample)]).encode())
    return {"plan": digest.hexdigest()[:16], "samples": num_samples, "options": options.planned()}


def _claim(output: Path, plan: dict) -> None:
    """Make the output folder this plan's, or refuse when it is another's."""
    path = output / ".records" / "plan.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != plan:
            raise PreparationError(
                f"{output} was begun with plan {found.get('plan')} ({found.get('samples')} samples, "
                f"{found.get('options')}), this call has plan {plan['plan']} ({plan['samples']} samples, "
                f"{plan['options']}): name another output, or delete {output}"
            )
        return
    strangers = sorted(output.glob("*.tar"))
    if strangers:
        raise PreparationError(
            f"{output} already holds {strangers[0].name}, not from here: name another output"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(plan))


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: TarSource | FolderSource
    output: Path
    options: PreparationOptions
    plan: str


_job: _Job | None = None


def _take(job: _Job) -> None:
    global _job
    _job = job


def _run(job: _Job, missing: dict[int, range], num_samples: int) -> Iterator[dict]:
    """Records of the missing shards as they are finished."""
    from tqdm import tqdm

    workers = min(job.options.workers or os.cpu_count() or 1, len(missing))
    done = num_samples - sum(map(len, missing.values()))
    with tqdm(
        total=num_samples, initial=done, unit="clip", desc=f"prepare {job.output}", disable=None
    ) as bar:
        if workers <= 1:
            for number, samples in missing.items():
                yield _write_shard(job, number, samples)
                bar.update(len(samples))
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "webdataset"])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_take, initargs=(job,))
        try:
            futures = {pool.submit(_work, number, samples): samples for number, samples in missing.items()}
            for future in as_completed(futures):
                yield future.result()
                bar.update(len(futures[future]))
        except BrokenProcessPool as error:
            raise PreparationError(
                f"{job.output}: a worker died (out of memory, or a decoder crashed); finished shards are "
                f"kept: run the same command again, with fewer than {workers} workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _work(number: int, samples: range) -> dict:
    assert _job is not None
    return _write_shard(_job, number, samples)


def _write_shard(job: _Job, number: int, samples: range) -> dict:
    """Write one shard with its index and its record, each whole or not at all."""
    from webdataset import TarWriter

    path = job.output / f"{number:05d}.tar"
    partial = path.with_name(f"{path.name}.partial")
    kept: list[str] = []
    dropped: list[dict] = []
    try:
        with (
            open(partial, "wb") as file,
            TarWriter(file, user="miles", group="miles", mtime=0, encoder=False) as tar,
        ):
            for sample in samples:
                key = job.source.key(sample)
                try:
                    members = encode_clip(key, job.source.load(sample), job.options)
                except SampleError as error:
                    where = job.source.identity(sample)
                    dropped.append({"key": key, "source": where, "cause": error.cause, "message": str(error)})
                    continue
                tar.write({"__key__": key, **members})
                kept.append(key)
        if kept:
            os.replace(partial, path)
            build_index(path)
        num_bytes = path.stat().st_size if kept else 0
        record = {"plan": job.plan, "shard": number, "bytes": num_bytes, "kept": kept, "dropped": dropped}
        write_whole(_record_path(job.output, number), json.dumps(record))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PreparationError(
            f"{path}: the disk is full; finished shards are kept: make room and run the same command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return record


def _record_path(output: Path, number: int) -> Path:
    return output / ".records" / f"{number:05d}.json"


def _finished(output: Path, number: int, plan: str) -> dict | None:
    """Record of a shard that an earlier call finished and that is still as it left it."""
    path = output / f"{number:05d}.tar"
    try:
        record = json.loads(_record_path(output, number).read_text())
        whole = not record["kept"] or (
            path.stat().st_size == record["bytes"] and path.with_suffix(".idx").is_file()
        )
    except (OSError, ValueError, KeyError):
        return None
    return record if whole and record["plan"] == plan else None


def _report(output: Path, records: list[dict], options: PreparationOptions, seconds: float) -> Summary:
    dropped = [line for record in records for line in record["dropped"]]
    write_whole(
        output / "quarantine.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in dropped)
    )
    summary = Summary(
        kept=sum(len(record["kept"]) for record in records),
        dropped=dict(sorted(Counter(line["cause"] for line in dropped).items())),
        shards=tuple(output / f"{record['shard']:05d}.tar" for record in records if record["kept"]),
        num_bytes=sum(record["bytes"] for record in records),
        seconds=round(seconds, 2),
    )
    written = asdict(summary) | {"shards": [path.name for path in summary.shards], "options": asdict(options)}
    written["not_written"] = [f"{record['shard']:05d}.tar" for record in records if not record["kept"]]
    write_whole(output / "summary.json", json.dumps(written, indent=1) + "\n")
    if not summary.kept:
        raise PreparationError(
            f"{output}: none of {len(dropped)} samples is usable {summary.dropped}; "
            f"see {output / 'quarantine.jsonl'}"
        )
    return summary
