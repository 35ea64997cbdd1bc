"""Preparation: videos or images with captions -> shards of frames (or of videos) that training reads.

Reads tars in any layout or a folder with a caption file; writes `DIR/00000.tar` (KEY.00.jpg ..., KEY.txt,
KEY.json) with its index, `quarantine.jsonl`, `summary.json` and `sample.html`, a page to look at.
What goes into which shard is a pure function of the input list and the options: an interrupted run goes on,
equal input gives equal bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from miles_fast.data.clip_sources import FolderSource, TarSource, distinct_keys
from miles_fast.data.fetching import RemoteTars, fetched
from miles_fast.data.locations import expand_shards, is_remote, local_path, shown
from miles_fast.data.preparation_options import PreparationError, PreparationOptions
from miles_fast.data.sample_page import write_sample_page
from miles_fast.data.shard_writing import Job, finished_shard, shard_path, write_shards
from miles_fast.data.tone_map import missing_tone_map
from miles_fast.files import write_whole

__all__ = ["PreparationError", "PreparationOptions", "Summary", "prepare"]

# Part of the plan: a change of what is written for the same input must not mix with shards written before it.
_FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a preparation wrote; also in summary.json. `shards` are the tars, in order.

    `seconds` and `clips_per_second` (kept or dropped) are of the last call alone, which may have gone on.
    """

    kept: int
    dropped: dict[str, int]
    shards: tuple[Path, ...]
    num_bytes: int
    seconds: float
    clips_per_second: float


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    options: PreparationOptions,
    captions: str | Path | None = None,
    caption_column: str | None = None,
) -> Summary:
    """Write frame shards of tars (patterns), or of a folder and its caption file; say what became of them.

    `caption_column` names the caption file's column or key where it is not `caption`.
    Finished shards of an earlier, interrupted call are kept, unless files of theirs have come, gone or
    changed in size since. Raises PreparationError when the output is a file or belongs to another plan, keys
    repeat, the disk is full or no sample is usable; ShardError or ClipListError for unusable input.
    """
    start = time.monotonic()
    if options.allow_hdr and (lack := missing_tone_map()):
        raise PreparationError(f"HDR videos cannot be mapped: {lack}, or do without --allow-hdr")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise PreparationError(f"{output} is no folder: name another output")
    source = _source([str(one) for one in inputs], captions, caption_column)
    if isinstance(source, FolderSource) and source.folder.resolve() == output.resolve():
        raise PreparationError(f"{output} is the folder of the clips: name another output")
    num_samples, ranges = _shares(source, options)
    plan = _plan(source, num_samples, options)
    with _claimed(output, plan):
        job = Job(source=source, output=output, options=options, plan=plan["plan"])
        found = {number: finished_shard(job, number, samples) for number, samples in enumerate(ranges)}
        records = {number: record for number, record in found.items() if record}
        missing = {number: samples for number, samples in enumerate(ranges) if number not in records}
        for record in write_shards(job, missing, num_samples):
            records[record["shard"]] = record
        ordered = [records[number] for number in sorted(records)]
        done = [record for record in ordered if record["shard"] in missing]
        num_done = sum(len(record["kept"]) + len(record["dropped"]) for record in done)
        summary = _report(output, ordered, options, time.monotonic() - start, num_done)
        about = f"{summary.kept} kept, {sum(summary.dropped.values())} dropped {summary.dropped or ''}"
        write_sample_page(summary.shards, output / "sample.html", seed=plan["plan"], about=about)
    return summary


def _shares(
    source: TarSource | FolderSource | RemoteTars, options: PreparationOptions
) -> tuple[int, list[range | None]]:
    """How many samples there are, and which of them each shard takes; of remote tars one shard each."""
    if isinstance(source, RemoteTars):
        if options.limit is not None:
            raise PreparationError("limit counts clips, which remote tars tell when fetched: name fewer tars")
        return len(source.urls), [None] * len(source.urls)
    num_samples, size = min(len(source), options.limit or len(source)), options.samples_per_shard
    return num_samples, [
        range(first, min(first + size, num_samples)) for first in range(0, num_samples, size)
    ]


def _source(
    inputs: list[str], captions: str | Path | None, caption_column: str | None
) -> TarSource | FolderSource | RemoteTars:
    remote = [one for one in inputs if is_remote(one)]
    if remote:
        if len(remote) < len(inputs) or captions is not None:
            raise PreparationError(
                f"{shown(remote[0])} is fetched: name addresses of tars alone, no local ones, no --captions"
            )
        return RemoteTars.open(remote)
    folders = [path for path in map(local_path, inputs) if path and os.path.isdir(path)]
    if folders and (len(inputs) > 1 or captions is None):
        raise PreparationError(
            f"{folders[0]} is a folder: give one folder and `--captions FILE` (csv, tsv, json), "
            "or tars as 'DIR/*.tar'"
        )
    if folders:
        with contextlib.ExitStack() as stack:
            listed: str | Path | None = local_path(str(captions))
            if listed is None:
                here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                listed = stack.enter_context(fetched(str(captions), here))
            return FolderSource.open(Path(folders[0]), Path(listed), caption_column)
    if captions is not None:
        for path in map(local_path, inputs):
            if path and not os.path.exists(path) and not set("*?[{") & set(path):
                raise PreparationError(
                    f"{path}: there is no such folder (working directory {os.getcwd()}): correct the path"
                )
        raise PreparationError(
            f"--captions {captions} goes with a folder of clips; tars carry their captions"
        )
    return TarSource.open(expand_shards(inputs))


def _plan(
    source: TarSource | FolderSource | RemoteTars, num_samples: int, options: PreparationOptions
) -> dict:
    planned = [_FORMAT, options.planned()]
    digest = hashlib.sha256(json.dumps(planned, sort_keys=True).encode())
    if isinstance(source, RemoteTars):
        digest.update(json.dumps([shown(url) for url in source.urls]).encode())
    else:
        digest.update(json.dumps(source.fingerprint()).encode())
        for sample, key in enumerate(distinct_keys(source, num_samples)):
            digest.update(json.dumps([key, source.identity(sample)]).encode())
    return {"plan": digest.hexdigest()[:16], "samples": num_samples, "options": options.planned()}


@contextlib.contextmanager
def _claimed(output: Path, plan: dict) -> Iterator[None]:
    """Make the output folder this plan's and this process's alone, or refuse when it is another's."""
    _claim(output, plan)
    with open(output / ".records" / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreparationError(
                f"{output}: another preparation is writing there; wait for it, or end it and run this again"
            ) from error
        for folder in (output, output / ".records"):
            for left_by_a_killed_one in folder.glob(".*.partial"):
                if left_by_a_killed_one.is_dir():
                    shutil.rmtree(left_by_a_killed_one)
                else:  # its workers may be ending just now, and remove it themselves
                    left_by_a_killed_one.unlink(missing_ok=True)
        yield


def _claim(output: Path, plan: dict) -> None:
    path = output / ".records" / "plan.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != plan:
            same = all(found.get(part) == plan[part] for part in ("samples", "options"))
            reason = "the clips found, their captions or their tars have changed: " if same else ""
            raise PreparationError(
                f"{output} was begun with plan {found.get('plan')} ({found.get('samples')} samples, "
                f"{found.get('options')}), this call has plan {plan['plan']} ({plan['samples']} samples, "
                f"{plan['options']}): {reason}name another output, or delete {output}"
            )
        return
    ours = "*.tar", "summary.json", "sample.html", "quarantine.jsonl"
    if strangers := sorted(path for pattern in ours for path in output.glob(pattern)):
        raise PreparationError(f"{output} already holds {strangers[0].name}: name another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(plan))


def _report(
    output: Path, records: list[dict], options: PreparationOptions, seconds: float, num_done: int
) -> Summary:
    dropped = [line for record in records for line in record["dropped"]]
    write_whole(
        output / "quarantine.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in dropped)
    )
    summary = Summary(
        kept=sum(len(record["kept"]) for record in records),
        dropped=dict(sorted(Counter(line["cause"] for line in dropped).items())),
        shards=tuple(shard_path(output, record["shard"]) for record in records if record["kept"]),
        num_bytes=sum(record["bytes"] for record in records),
        seconds=round(seconds, 2),
        clips_per_second=round(num_done / seconds, 2),
    )
    written = asdict(summary) | {"shards": [path.name for path in summary.shards], "options": asdict(options)}
    written["not_written"] = [
        shard_path(output, record["shard"]).name for record in records if not record["kept"]
    ]
    write_whole(output / "summary.json", json.dumps(written, indent=1) + "\n")
    if not summary.kept:
        raise PreparationError(
            f"{output}: none of {len(dropped)} samples is usable {summary.dropped}; "
            f"see {output / 'quarantine.jsonl'}"
        )
    return summary
