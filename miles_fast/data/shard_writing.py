"""Prepared shards, written side by side by processes: each whole with its index and record, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from miles_fast.data.clip_frames import encode_clip
from miles_fast.data.clip_sources import FolderSource, TarSource, distinct_keys
from miles_fast.data.clip_videos import encode_video
from miles_fast.data.fetching import RemoteTars, fetched
from miles_fast.data.locations import shown
from miles_fast.data.preparation_options import PreparationError, PreparationOptions
from miles_fast.data.shards import SampleError, ShardError, build_index
from miles_fast.files import write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Clips to prepare, where to, how, and the plan that the records name."""

    source: TarSource | FolderSource | RemoteTars
    output: Path
    options: PreparationOptions
    plan: str


def write_shards(job: Job, missing: dict[int, range | None], num_samples: int) -> Iterator[dict]:
    """Write the missing shards (number -> samples) and yield the record of each as it is finished.

    Shows clips done, their rate and the time left, out of `num_samples`; of remote tars, whose clips are not
    known beforehand (samples None), tars. Raises PreparationError.
    """
    from tqdm import tqdm

    workers = min(job.options.workers or os.cpu_count() or 1, len(missing))
    already = num_samples - sum(1 if samples is None else len(samples) for samples in missing.values())
    unit = "tar" if isinstance(job.source, RemoteTars) else "clip"
    seconds = 0.5 if sys.stderr.isatty() else 30.0  # a log wants fewer lines than a screen
    with tqdm(
        total=num_samples, initial=already, unit=unit, desc=f"prepare {job.output}", mininterval=seconds
    ) as bar:
        if workers > 1:
            yield from _write_beside(job, missing, workers, bar)
        else:
            for number, samples in missing.items():
                yield _write_shard(job, number, samples, bar.update)


def _write_beside(job: Job, missing: dict[int, range | None], workers: int, bar) -> Iterator[dict]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "webdataset"])
    count = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(job, count))
    try:
        pending = {pool.submit(_work, number, samples) for number, samples in missing.items()}
        while pending:
            done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(count.value - (bar.n - bar.initial))
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise PreparationError(
            f"{job.output}: a worker died (out of memory, or a decoder crashed); finished shards are "
            f"kept: run the same command again, with fewer than {workers} workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work_of: tuple | None = None  # a worker's job and the count that all workers share


def _begin(job: Job, count) -> None:
    global _work_of
    _work_of = job, count
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    # A worker that outlived a killed preparation would write beside the one that goes on.
    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(number: int, samples: range | None) -> dict:
    assert _work_of is not None
    job, count = _work_of

    def add() -> None:
        with count.get_lock():
            count.value += 1

    return _write_shard(job, number, samples, add)


@contextlib.contextmanager
def _at_hand(
    job: Job, number: int, samples: range | None
) -> Iterator[tuple[TarSource | FolderSource, range]]:
    """The source and the samples of one shard; a remote tar is here as long as this lasts."""
    if not isinstance(job.source, RemoteTars):
        assert samples is not None
        yield job.source, samples
        return
    url = job.source.urls[number]
    with fetched(url, job.output) as path:
        try:
            source = TarSource.open([path])
        except ShardError as error:
            raise PreparationError(f"{shown(url)}: {error}") from error
        distinct_keys(source, len(source))
        yield source, range(len(source))


def _write_shard(job: Job, number: int, samples: range | None, tell: Callable[[], object]) -> dict:
    """Write one shard with its index and its record; `tell` is called for every sample (remote tar) done."""
    from webdataset import TarWriter

    path = shard_path(job.output, number)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    encode = encode_clip if job.options.layout == "frames" else encode_video
    kept: list[str] = []
    dropped: list[dict] = []
    sizes = _sizes(job, samples)
    try:
        with (
            _at_hand(job, number, samples) as (source, at_hand),
            open(partial, "wb") as file,
            TarWriter(file, user="miles", group="miles", mtime=0, encoder=False) as tar,
        ):
            for sample in at_hand:
                key = source.key(sample)
                try:
                    members = encode(key, source.load(sample), job.options)
                except SampleError as error:
                    where = source.identity(sample)
                    dropped.append({"key": key, "source": where, "cause": error.cause, "message": str(error)})
                else:
                    tar.write({"__key__": key, **members})
                    kept.append(key)
                if samples is not None:
                    tell()
        if samples is None:
            tell()
        _record_path(job.output, number).unlink(missing_ok=True)  # it may be of what is replaced now
        if kept:
            os.replace(partial, path)
            build_index(path)
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(".idx").unlink(missing_ok=True)
        num_bytes = path.stat().st_size if kept else 0
        record = {"plan": job.plan, "shard": number, "bytes": num_bytes, "kept": kept, "dropped": dropped}
        if sizes is not None:
            record["sizes"] = sizes
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


def shard_path(output: Path, number: int) -> Path:
    """Where a shard lies."""
    return output / f"{number:05d}.tar"


def _sizes(job: Job, samples: range | None) -> list[int | str] | None:
    """Sizes of a folder's files, which may be mended between calls; those of tars are part of the plan."""
    if not isinstance(job.source, FolderSource):
        return None
    assert samples is not None
    return job.source.sizes(samples)


def finished_shard(job: Job, number: int, samples: range | None) -> dict | None:
    """Record of a shard that an earlier call finished, still as it left it, of files of the same sizes."""
    path = shard_path(job.output, number)
    try:
        record = json.loads(_record_path(job.output, number).read_text())
        whole = not record["kept"] or (
            path.stat().st_size == record["bytes"] and path.with_suffix(".idx").is_file()
        )
    except (OSError, ValueError, KeyError):
        return None
    if not whole or record["plan"] != job.plan:
        return None
    sizes = _sizes(job, samples)
    if record.get("sizes", sizes) != sizes:  # records of earlier versions hold none
        changed = [
            job.source.identity(sample)
            for sample, then, now in zip(samples, record["sizes"], sizes, strict=True)
            if then != now
        ]
        others = f" and {len(changed) - 1} others" if changed[1:] else ""
        logger.warning("%s is written again: %s%s changed since", path, changed[0], others)
        return None
    return record
