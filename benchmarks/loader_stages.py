"""The loader as a whole and each of its stages alone, so that the slowest of them shows."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from miles_fast.config import Config
from miles_fast.data.augmentation import build_augmentation
from miles_fast.data.batches import Quarantine
from miles_fast.data.clips import Clip
from miles_fast.data.loader import AHEAD, Loader
from miles_fast.data.order import Share
from miles_fast.data.reading import ReadingPool
from miles_fast.data.videos import EncodedVideo
from miles_fast.models.text_encoder import load_tokenizer

WARMUP = 5


@dataclass(frozen=True, kw_only=True)
class LoaderFigures:
    """Rates of the whole loader, and milliseconds a batch of each stage running alone; reading tokenises too.

    `growth_mib_per_thousand` is how much resident memory, reading processes included, a thousand batches add.
    `batch_bytes` are the frames' bytes as they are read (JPEG, or pixels of decoded videos), `takes` says
    what they come as.
    """

    clips_per_second: float
    frames_per_second: float
    megabytes_per_second: float
    batch_milliseconds: float
    reading_milliseconds: float
    decoding_milliseconds: float
    growth_mib_per_thousand: float
    batch_bytes: int
    takes: str


def open_loader(config: Config, batch: int, device: torch.device) -> Loader:
    """The training loader of a config, on one rank, without masks."""
    return Loader(
        config.data,
        image_size=config.model.video.image_size,
        tokenizer=load_tokenizer(config.model.text.tokenizer_source),
        share=Share(batch=batch),
        seed=config.run.seed,
        device=device,
        quarantine=Quarantine(None),
    )


def measure_loader(config: Config, batch: int, batches: int, device: torch.device) -> LoaderFigures:
    """Time `batches` batches of the loader with nothing behind it, and its stages one by one."""
    loader = open_loader(config, batch, device)
    with contextlib.closing(loader.batches(0)) as stream:
        settled = max(1, batches // 5)
        _milliseconds(lambda: next(stream), settled)
        before = _resident_bytes()
        whole = _milliseconds(lambda: next(stream), batches)
        growth = (_resident_bytes() - before) / 2**20 / (batches + WARMUP) * 1000
    reading = time_reading(loader, config.data.decode_workers, batches)
    request = loader.request(0)
    clips = [clip for clip, _ in loader.reader.answer(request)]
    batch_bytes = sum(_frame_bytes(clip) for clip in clips)
    per_second = 1000 / whole
    return LoaderFigures(
        clips_per_second=batch * per_second,
        frames_per_second=batch * config.data.frames_per_clip * per_second,
        megabytes_per_second=batch_bytes * per_second / 1e6,
        batch_milliseconds=whole,
        reading_milliseconds=reading,
        decoding_milliseconds=_time_decoding(config, clips, request.draw.takes, device, batches),
        growth_mib_per_thousand=growth,
        batch_bytes=batch_bytes,
        takes=request.draw.takes,
    )


def _milliseconds(call: Callable[[], Any], times: int, warmup: int = WARMUP) -> float:
    for _ in range(warmup):
        call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return 1000 * (time.perf_counter() - start) / times


def time_reading(
    loader: Loader,
    workers: int,
    batches: int,
    warmup: int = WARMUP,
    before: Callable[[], None] = lambda: None,
) -> float:
    """Milliseconds a batch of the reading processes alone; `before` is called when they have started."""
    with contextlib.closing(ReadingPool(loader.reader, workers)) as pool:
        for started in [pool.call(int) for _ in range(workers)]:
            started.collect()
            started.release()
        before()
        waiting = map(loader.request, itertools.count())
        coming = deque(pool.submit(next(waiting)) for _ in range(AHEAD + 1))

        def read() -> None:
            pending = coming.popleft()
            pending.collect()
            pending.release()
            coming.append(pool.submit(next(waiting)))

        return _milliseconds(read, batches, warmup)


def _time_decoding(
    config: Config, clips: list[Clip], takes: str, device: torch.device, batches: int
) -> float:
    graph = build_augmentation(
        config.data.augmentation,
        takes=takes,
        num_clips=len(clips),
        num_frames=config.data.frames_per_clip,
        size=config.model.video.image_size,
        device=device,
        threads=config.data.threads,
        jpeg_decoder=config.data.jpeg_decoder,
    )
    frames, views = [clip.frames for clip in clips], [clip.view for clip in clips]
    graph.submit(frames, views)

    def decode() -> None:
        graph.submit(frames, views)
        graph.collect()

    milliseconds = _milliseconds(decode, batches)
    graph.collect()
    return milliseconds


def _resident_bytes() -> int:
    import psutil

    own = psutil.Process()
    return sum(process.memory_info().rss for process in (own, *own.children(recursive=True)))


def _frame_bytes(clip: Clip) -> int:
    if isinstance(clip.frames, EncodedVideo):
        return clip.frames.data.nbytes
    return sum(frame.nbytes for frame in clip.frames)
