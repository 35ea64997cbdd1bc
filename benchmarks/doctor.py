"""What holds a training run back on this machine and these shards, what that costs, and what removes it."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loader_stages import WARMUP, LoaderFigures, measure_loader, open_loader, time_reading

from miles_fast.config import Config
from miles_fast.data.batches import Batch
from miles_fast.data.loader import Loader
from miles_fast.training.loop import Deal, pretrain
from miles_fast.training.progress import read_log

CACHED_BATCHES = 4
NOTICEABLE = 0.02  # share of the step's speed; below it two runs do not differ


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Rates and milliseconds a batch: the loader's stages, and the step on three kinds of data.

    `cold_milliseconds` is reading with the shards dropped from the page cache; `transfer_milliseconds` moves
    one batch's pixels to the device.
    """

    loader: LoaderFigures
    cold_milliseconds: float
    transfer_milliseconds: float
    synthetic_clips_per_second: float
    cached_clips_per_second: float
    real_clips_per_second: float

    @property
    def compute_clips_per_second(self) -> float:
        """What the step makes when it never waits for data."""
        return max(self.synthetic_clips_per_second, self.cached_clips_per_second)


def examine(config: Config, settings: Any, batches: int, device: torch.device) -> Examination:
    """Measure everything, one after the other; each step figure is the median of a run of its own."""
    stages = measure_loader(config, settings.batch, batches, device)
    cold = _time_cold_reading(config, settings.batch, batches, device)
    size = (settings.batch, config.data.frames_per_clip, 3, *[config.model.video.image_size] * 2)
    return Examination(
        loader=stages,
        cold_milliseconds=cold,
        transfer_milliseconds=_time_transfer(size, device),
        synthetic_clips_per_second=_time_steps(config, settings, _synthetic, "synthetic"),
        cached_clips_per_second=_time_steps(config, settings, _cached, "cached"),
        real_clips_per_second=_time_steps(config, settings, Loader.batches, "real"),
    )


def verdict(found: Examination, config: Config, batch: int) -> str:
    """The bottleneck in words: what it is, what it costs, which setting or preparation would remove it."""
    compute, real = found.compute_clips_per_second, found.real_clips_per_second
    step, lost = 1000 * batch / compute, 1 - real / compute
    if lost < NOTICEABLE:
        return (
            f"The step itself is the bottleneck: {real:.0f} clips/s with real data, {compute:.0f} without "
            f"waiting for any. The loader alone could feed {found.loader.clips_per_second / compute:.1f} "
            "times that; faster data would gain nothing, run.compile=true or a larger batch might."
        )
    reading = found.loader.reading_milliseconds
    stages = {
        "storage": found.cold_milliseconds if found.cold_milliseconds > 1.5 * reading else 0.0,
        "reading": reading,
        "decoding": found.loader.decoding_milliseconds,
        "transfer": found.transfer_milliseconds,
    }
    slowest = max(stages, key=lambda name: stages[name])
    cost = f"{100 * lost:.0f} % of the step's speed ({compute:.0f} -> {real:.0f} clips/s)"
    if stages[slowest] < step:
        return (
            f"No stage alone is slower than the step ({step:.1f} ms a batch; the slowest is {slowest}, "
            f"{stages[slowest]:.1f} ms), yet together they cost {cost}: they share {os.cpu_count()} cores "
            "with the training process. Fewer data.decode_workers or data.threads, or more cores, would help."
        )
    return (
        f"{slowest.capitalize()} is the bottleneck: {stages[slowest]:.1f} ms a batch, where the step takes "
        f"{step:.1f}. It costs {cost}. {_remedy(slowest, found, config, batch)}"
    )


def report(found: Examination, config: Config, batch: int) -> str:
    """The measurements as a table, and the verdict."""
    rows = {
        "reading and tokenising, not in memory": found.cold_milliseconds,
        "reading and tokenising, in memory": found.loader.reading_milliseconds,
        "decoding and augmentation": found.loader.decoding_milliseconds,
        "transfer of the pixels": found.transfer_milliseconds,
        "loader as a whole": found.loader.batch_milliseconds,
        "step on synthetic data": 1000 * batch / found.synthetic_clips_per_second,
        "step on cached data": 1000 * batch / found.cached_clips_per_second,
        "step on real data": 1000 * batch / found.real_clips_per_second,
    }
    lines = [f"{'':<40}{'ms a batch':>12}{'clips/s':>10}"]
    lines += [f"{name:<40}{ms:>12.2f}{1000 * batch / ms:>10.0f}" for name, ms in rows.items() if ms]
    return "\n".join([*lines, "", verdict(found, config, batch)])


def _remedy(stage: str, found: Examination, config: Config, batch: int) -> str:
    batches_per_second, megabytes = found.compute_clips_per_second / batch, found.loader.batch_bytes / 1e6
    if stage == "storage":
        return (
            f"The shards come at {1000 * megabytes / found.cold_milliseconds:.0f} MB/s, and the step needs "
            f"{megabytes * batches_per_second:.0f}: put them on a faster disk, or prepare them smaller "
            "(launch/prepare.py --short-side, --quality)."
        )
    if stage == "reading":
        workers = config.data.decode_workers
        needed = math.ceil(workers * found.loader.reading_milliseconds * batches_per_second / 1000)
        more = f"raise data.decode_workers from {workers} to {needed} (of {os.cpu_count()} cores)"
        if found.loader.takes == "jpeg":
            return f"{more.capitalize()}."
        return f"Videos are decoded while training: prepare frames once (launch/prepare.py), or {more}."
    if stage == "decoding":
        idle_decoder = torch.cuda.is_available() and config.data.jpeg_decoder == "cpu"
        on_gpu = ", set data.jpeg_decoder=nvjpeg" if idle_decoder else ""
        return (
            f"Raise data.threads from {config.data.threads}{on_gpu}, install DALI where it is missing, or "
            "prepare smaller frames (launch/prepare.py --short-side)."
        )
    return "The link to the GPU is slow: see `nvidia-smi topo -m`, and whether its slot runs at full width."


def _time_cold_reading(config: Config, batch: int, batches: int, device: torch.device) -> float:
    loader = open_loader(config, batch, device)

    def drop() -> None:
        for shards in loader.shard_sets:
            for place in shards.paths:
                path = place if isinstance(place, Path) else shards.cache.path(place)
                if path.exists():  # a remote shard may not be in the cache
                    _drop_from_memory(path)

    # A warm-up would bring the shards back into memory.
    return time_reading(loader, config.data.decode_workers, batches, warmup=0, before=drop)


def _drop_from_memory(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _time_transfer(size: tuple[int, ...], device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    pixels = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    times = []
    for _ in range(WARMUP + 10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        pixels.to(device, non_blocking=True)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[WARMUP:])


def _time_steps(config: Config, settings: Any, deal: Deal, name: str) -> float:
    run = replace(config.run, folder=f"{config.run.folder}-{name}")
    pretrain(replace(config, run=run), settings, deal=deal)
    records = [r for r in read_log(Path(run.folder)) if "loss" in r and r["step"] > WARMUP]
    return statistics.median(record["clips_per_second"] for record in records)


def _cached(loader: Loader, first_step: int) -> Generator[Batch, None, None]:
    stream = loader.batches(first_step)
    kept = [next(stream) for _ in range(CACHED_BATCHES)]
    stream.close()
    while True:
        yield from kept


def _synthetic(loader: Loader, first_step: int) -> Generator[Batch, None, None]:
    stream = loader.batches(first_step)
    one = next(stream)
    stream.close()
    made = replace(one, video_BTCHW=torch.randn_like(one.video_BTCHW))
    while True:
        yield made
