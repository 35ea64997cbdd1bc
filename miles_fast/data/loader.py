"""Batches for training and evaluation: read, checked, decoded and tokenised off the training thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.batches import Batch, BatchFinisher, Quarantine
from miles_fast.data.clips import BadSample, Clip, ClipDraw, Input
from miles_fast.data.mixture import Mixture
from miles_fast.data.order import Share
from miles_fast.data.prefetch import SequentialPrefetcher, WindowPrefetcher, check_room
from miles_fast.data.reading import Pending, Reader, ReadingPool, Request
from miles_fast.data.shards import SampleError, ShardError, ShardSet
from miles_fast.data.sources import open_shards, order_of
from miles_fast.distributed import logger
from miles_fast.models.caption_tokens import CaptionEncoder

AHEAD = 2  # batches being read while one is handed over


class Loader:
    """Deals batches of the training sources, which take turns by optimizer step as their weights say."""

    def __init__(
        self,
        data: DataConfig,
        *,
        image_size: int,
        tokenizer: Any,
        share: Share,
        seed: int,
        device: torch.device,
        quarantine: Quarantine,
        draw_masks: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        """`draw_masks(micro_step)` gives this rank's masks (B, M); micro steps count from 0 over the run.

        It is called in a reading process, and must therefore be picklable.
        """
        self.shard_sets = [open_shards(source, data) for source in data.train]
        self.reader = Reader(
            shard_sets=self.shard_sets, encode=CaptionEncoder(tokenizer, data.caption_tokens)
        )
        self._orders = [
            order_of(shards, data, seed + source) for source, shards in enumerate(self.shard_sets)
        ]
        check_room(self.shard_sets, self._orders)
        for shards, source in zip(self.shard_sets, data.train, strict=True):
            if share.rank == 0 and len(shards) < share.batch * share.ranks:
                logger.warning(
                    "%s holds %d clips, a pass of all ranks takes %d: clips are among their own negatives",
                    *(source.name, len(shards), share.batch * share.ranks),
                )
        self._mixture = Mixture([source.weight for source in data.train])
        self._draws = [
            ClipDraw(
                num_frames=data.frames_per_clip,
                takes=_input(shards, source, data, device),
                crop_scale=data.crop_scale,
                flip=data.flip,
            )
            for shards, source in zip(self.shard_sets, data.train, strict=True)
        ]
        self.share, self.quarantine, self._draw_masks = share, quarantine, draw_masks
        self._finish = BatchFinisher(data, image_size, share.batch, device)
        self._prefetch, self._num_workers = data.prefetch_batches, data.decode_workers

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        """Endless micro batches from optimizer step `first_step` (0-based); close it when done."""
        return _in_background(self._make_batches(first_step), self._prefetch)

    def _make_batches(self, first_step: int) -> Generator[Batch, None, None]:
        coming: deque[tuple[Request, Pending, Pending | None]] = deque()
        micro_step = first_step * self.share.accumulation
        with contextlib.ExitStack() as stack:
            stack.callback(self._finish.drop)
            pool = stack.enter_context(contextlib.closing(ReadingPool(self.reader, self._num_workers)))
            windows = WindowPrefetcher(self.shard_sets, self._orders, AHEAD + 1)
            stack.enter_context(contextlib.closing(windows))
            while True:
                while len(coming) <= AHEAD:
                    request = self.request(micro_step)
                    windows.coming(request.source, *self._stretch(micro_step))
                    pending = pool.submit(request)
                    drawing = pool.call(self._draw_masks, micro_step) if self._draw_masks else None
                    coming.append((request, pending, drawing))
                    micro_step += 1
                request, pending, drawing = coming.popleft()
                clips = self._accept(pending.collect())
                masks = None
                if drawing is not None:
                    masks = drawing.collect()[0].copy()
                    drawing.release()
                again = partial(self._read_here, request)
                yield from self._finish.submit(request.draw.takes, clips, masks, again)
                pending.release()

    def request(self, micro_step: int) -> Request:
        """What this rank reads for a micro step, counted from 0 over the run."""
        step, micro = divmod(micro_step, self.share.accumulation)
        source, turn = self._mixture.serve(step)
        order = self._orders[source]
        draws = tuple(map(order.draw, self.share.places(turn, micro)))
        return Request(source=source, draw=self._draws[source], items=draws, seed=order.seed)

    def _stretch(self, micro_step: int) -> tuple[int, int]:
        """First and last place that a step takes of its source on all ranks, which may share a cache."""
        _, turn = self._mixture.serve(micro_step // self.share.accumulation)
        start = turn * self.share.global_batch
        return start, start + self.share.global_batch - 1

    def _read_here(self, request: Request) -> list[Clip]:
        return self._accept(self.reader.answer(_by_cpu(request)))

    def _accept(self, answers: list[tuple[Clip, list[BadSample]]]) -> list[Clip]:
        for _, bad in answers:
            self.quarantine.add(bad)
        self.quarantine.accept(len(answers))
        return [clip for clip, _ in answers]


class EvaluationLoader:
    """Deals the samples of a source in order, as evaluation sees them, as often as it is asked to."""

    def __init__(
        self,
        source: SourceConfig,
        data: DataConfig,
        *,
        image_size: int,
        tokenizer: Any,
        batch: int,
        device: torch.device,
    ) -> None:
        self.name = source.name
        self._shards = open_shards(source, data)
        takes = _input(self._shards, source, data, device)
        self._reader = Reader(
            shard_sets=[self._shards], encode=CaptionEncoder(tokenizer, data.caption_tokens)
        )
        self._draw = ClipDraw(num_frames=data.frames_per_clip, takes=takes)
        self._finish = BatchFinisher(data, image_size, batch, device)
        self.batch, self._num_workers = batch, data.decode_workers

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def shards(self) -> ShardSet:
        """Where the samples are, by number: their keys and captions."""
        return self._shards

    def batches(self, quarantine: Quarantine, samples: range | None = None) -> Generator[Batch, None, None]:
        """Batches of `samples` (default: all), made ahead on a thread; close it when done.

        Unreadable ones are counted and left out, never scored as misses.
        """
        samples = range(len(self)) if samples is None else samples
        return _in_background(self._make_batches(quarantine, samples), AHEAD)

    def _make_batches(self, quarantine: Quarantine, samples: range) -> Generator[Batch, None, None]:
        coming: deque[tuple[Request, Pending]] = deque()
        with contextlib.ExitStack() as stack:
            stack.callback(self._finish.drop)
            pool = stack.enter_context(contextlib.closing(ReadingPool(self._reader, self._num_workers)))
            ahead = SequentialPrefetcher(self._shards, samples, AHEAD + 1)
            stack.enter_context(contextlib.closing(ahead))
            for start in range(0, len(samples) + AHEAD * self.batch, self.batch):
                items = tuple(samples[start : start + self.batch])
                if items:
                    ahead.coming(items[0], items[-1])
                    request = Request(source=0, draw=self._draw, items=items, seed=None)
                    coming.append((request, pool.submit(request)))
                if coming and (len(coming) > AHEAD or not items):
                    yield from self._finish_next(*coming.popleft(), quarantine)
            yield from self._finish.flush()

    def _finish_next(self, request: Request, pending: Pending, quarantine: Quarantine) -> Iterator[Batch]:
        def read_here() -> list[Clip]:
            return _readable(self._reader.answer(_by_cpu(request)), quarantine)

        clips = _readable(pending.collect(), quarantine)
        if clips:
            yield from self._finish.submit(request.draw.takes, clips, None, read_here)
        pending.release()


def _by_cpu(request: Request) -> Request:
    return replace(request, draw=replace(request.draw, takes="pixels"))


def _readable(found: list[Clip | BadSample], quarantine: Quarantine) -> list[Clip]:
    quarantine.add([item for item in found if isinstance(item, BadSample)])
    return [item for item in found if isinstance(item, Clip)]


def _input(shards: ShardSet, source: SourceConfig, data: DataConfig, device: torch.device) -> Input:
    """What the clips of a source come as: the layout of its first usable sample decides."""
    for sample in range(min(len(shards), 1000)):
        with contextlib.suppress(SampleError):
            if shards[sample].layout() != "video":
                return "jpeg"
            if data.video_decoder == "nvdec" and device.type != "cuda":
                raise ValueError("data.video_decoder = nvdec needs a CUDA GPU; use cpu, or frame shards")
            return "video" if data.video_decoder == "nvdec" else "pixels"
    raise ShardError(
        f"source {source.name!r} ({', '.join(source.shards)}): no sample has frames, a video or an image; "
        "see the README on shard layouts"
    )


def _in_background(make: Generator[Batch, None, None], depth: int) -> Generator[Batch, None, None]:
    """Run a generator on its own thread, at most `depth` items ahead; its end and errors come here too."""
    items: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            if stream is not None:
                # A thread begins on GPU 0, where the decoding would give every other rank a context, too.
                torch.cuda.set_device(stream.device)
            with contextlib.closing(make):
                for item in make:
                    if item.video_BTCHW.is_cuda:
                        # Here and not where the batch is used: there each call would hand the GIL over.
                        item.record_stream(stream)
                    put(item)
                    if stop.is_set():
                        return
            put(None)
        except BaseException as error:  # noqa: BLE001  handed to the training thread, which raises it
            put(error)

    def take() -> Batch | None:
        item = items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        # The only reference is handed over: whoever took a batch decides when it is freed.
        yield from iter(take, None)
    finally:
        stop.set()
        thread.join()
