"""Batches for training and evaluation: read, checked, decoded and tokenised off the training thread."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.augmentation import build_augmentation
from miles_fast.data.clips import BadSample, Clip, ClipDraw, bad_sample, read_clip, read_or_substitute
from miles_fast.data.order import Draw, Share, draw_at
from miles_fast.data.shards import SampleError, ShardError, ShardSet, expand_shards
from miles_fast.models.text_encoder import encode_captions

AHEAD = 2  # batches being decoded while one is handed over


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch on the device: normalised clips, captions, masks (training), keys in row order."""

    video_BTCHW: Tensor
    token_ids_BL: Tensor
    attention_BL: Tensor
    masked_BM: Tensor | None
    keys: tuple[str, ...]


class Quarantine:
    """Counts bad samples by cause and lists each of them once in a JSONL file."""

    def __init__(self, path: Path | None) -> None:
        self.counts: Counter[str] = Counter()
        self._path, self._seen = path, set()

    def add(self, bad: list[BadSample]) -> None:
        """Count these, and list those not met before."""
        for sample in bad:
            self.counts[sample.cause] += 1
            if self._path is None or (sample.shard, sample.key) in self._seen:
                continue
            self._seen.add((sample.shard, sample.key))
            with open(self._path, "a") as file:
                file.write(json.dumps(asdict(sample)) + "\n")


class ClipSource:
    """A shard set with what reads it: threads for images, processes for videos."""

    def __init__(self, config: SourceConfig, data: DataConfig, draw: ClipDraw, seed: int) -> None:
        self.name = config.name
        self.shards = ShardSet(expand_shards(config.shards))
        self.encoded = _layout_kind(self.shards, config) == "images"
        self.draw, self.seed = draw, seed
        if data.video_decoder == "nvdec" and not self.encoded:
            raise ValueError("data.video_decoder = nvdec is not supported yet: use cpu or frame shards")
        self._pool: Executor
        if self.encoded:
            self._pool = ThreadPoolExecutor(data.decode_workers, thread_name_prefix="clips")
        else:
            self._pool = ProcessPoolExecutor(
                data.decode_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_keep_shards,
                initargs=(self.shards,),
            )

    def submit_training(self, draw: Draw) -> Future[tuple[Clip, list[BadSample]]]:
        """Read the drawn clip, or a substitute, in the background."""
        if self.encoded:
            return self._pool.submit(read_or_substitute, self.shards, draw, self.draw, self.seed)
        return self._pool.submit(_read_or_substitute_here, draw, self.draw, self.seed)

    def submit_evaluation(self, sample: int) -> Future[Clip | BadSample]:
        """Read a clip as evaluation sees it, in the background."""
        if self.encoded:
            return self._pool.submit(_read_evaluation, self.shards, sample, self.draw)
        return self._pool.submit(_read_evaluation_here, sample, self.draw)

    def close(self) -> None:
        """End the workers."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Loader:
    """Deals batches of the training sources, alternating between them by optimizer step."""

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
        """`draw_masks(micro_step)` gives this rank's masks (B, M); micro steps count from 0 over the run."""
        draw = ClipDraw(num_frames=data.frames_per_clip, crop_scale=data.crop_scale, flip=data.flip)
        self.sources = [ClipSource(source, data, draw, seed + i) for i, source in enumerate(data.train)]
        self.share, self.quarantine, self._draw_masks = share, quarantine, draw_masks
        self._finish = BatchFinisher(data, image_size, tokenizer, share.batch, device)
        self._prefetch = data.prefetch_batches

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless micro batches from optimizer step `first_step` (0-based); close it when done."""
        return _in_background(self._make_batches(first_step), self._prefetch)

    def close(self) -> None:
        """End the workers."""
        for source in self.sources:
            source.close()

    def _make_batches(self, first_step: int) -> Iterator[Batch]:
        pending: deque[tuple[ClipSource, int, list[Future]]] = deque()
        micro_step = first_step * self.share.accumulation
        while True:
            while len(pending) <= AHEAD:
                step, micro = divmod(micro_step, self.share.accumulation)
                turn, which = divmod(step, len(self.sources))
                source = self.sources[which]
                draws = [
                    draw_at(len(source.shards), source.seed, place)
                    for place in self.share.places(turn, micro)
                ]
                pending.append((source, micro_step, [source.submit_training(draw) for draw in draws]))
                micro_step += 1
            source, made, futures = pending.popleft()
            clips = []
            for future in futures:
                clip, bad = future.result()
                self.quarantine.add(bad)
                clips.append(clip)
            masks = self._draw_masks(made) if self._draw_masks is not None else None
            yield from self._finish.submit(source, clips, masks)


class BatchFinisher:
    """Clips to device tensors; one batch is decoded while the next is read, one graph a kind of input."""

    def __init__(
        self, data: DataConfig, image_size: int, tokenizer: Any, batch: int, device: torch.device
    ) -> None:
        self._data, self._image_size, self._tokenizer = data, image_size, tokenizer
        self._batch, self._device = batch, device
        self._graphs: dict[bool, Any] = {}
        self._pending: tuple[bool, tuple[str, ...], list[Tensor | None]] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, source: ClipSource, clips: list[Clip], masks: np.ndarray | None) -> Iterator[Batch]:
        """Queue one batch and yield the one before it."""
        graph = self._graphs.get(source.encoded)
        if graph is None:
            graph = self._graphs[source.encoded] = build_augmentation(
                self._data.augmentation,
                encoded=source.encoded,
                num_images=self._batch * self._data.frames_per_clip,
                num_frames=self._data.frames_per_clip,
                size=self._image_size,
                device=self._device,
                threads=self._data.threads,
            )
        yield from self.flush()
        graph.submit([clip.frames for clip in clips], [clip.view for clip in clips])
        ids, attention = encode_captions(
            self._tokenizer, [clip.caption for clip in clips], self._data.caption_tokens
        )
        arrays = (ids, attention, masks)
        tensors = [torch.from_numpy(array) if array is not None else None for array in arrays]
        self._pending = (source.encoded, tuple(clip.key for clip in clips), tensors)

    def flush(self) -> Iterator[Batch]:
        """Yield the batch that is still being decoded."""
        if self._pending is not None:
            yield self._collect()

    def _collect(self) -> Batch:
        (encoded, keys, tensors), self._pending = self._pending, None
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            video = self._graphs[encoded].collect()
            ids, attention, masks = (
                tensor if tensor is None else tensor.to(self._device, non_blocking=True) for tensor in tensors
            )
            if self._stream:
                self._stream.synchronize()
        return Batch(video_BTCHW=video, token_ids_BL=ids, attention_BL=attention, masked_BM=masks, keys=keys)


def evaluation_batches(
    config: SourceConfig,
    data: DataConfig,
    *,
    image_size: int,
    tokenizer: Any,
    batch: int,
    device: torch.device,
    samples: range | None = None,
    quarantine: Quarantine | None = None,
) -> Iterator[Batch]:
    """Batches of `samples` (default: all) in order, as evaluation sees them; unreadable ones are counted
    in `quarantine` and left out, never scored as misses."""
    source = ClipSource(config, data, ClipDraw(num_frames=data.frames_per_clip), seed=0)
    finish = BatchFinisher(data, image_size, tokenizer, batch, device)
    quarantine = quarantine or Quarantine(None)
    samples = range(len(source.shards)) if samples is None else samples
    try:
        futures = deque()
        for start in range(0, len(samples) + 2 * batch, batch):
            futures.append([source.submit_evaluation(sample) for sample in samples[start : start + batch]])
            if len(futures) <= AHEAD:
                continue
            results = [future.result() for future in futures.popleft()]
            quarantine.add([result for result in results if isinstance(result, BadSample)])
            clips = [result for result in results if isinstance(result, Clip)]
            if clips:
                yield from finish.submit(source, clips, None)
        yield from finish.flush()
    finally:
        source.close()


def count_samples(config: SourceConfig) -> int:
    """Samples of a source."""
    return len(ShardSet(expand_shards(config.shards)))


def _layout_kind(shards: ShardSet, config: SourceConfig) -> str:
    for sample in range(min(len(shards), 1000)):
        with contextlib.suppress(SampleError):
            return "video" if shards.layout(sample) == "video" else "images"
    raise ShardError(
        f"source {config.name!r} ({', '.join(config.shards)}): no sample has frames, a video or an image; "
        "see the README on shard layouts"
    )


def _in_background(make: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Run a generator on its own thread, at most `depth` items ahead; its errors are raised here."""
    items: queue.Queue[Batch | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in make:
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  handed to the training thread, which raises it
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            if item.video_BTCHW.is_cuda:
                for tensor in (item.video_BTCHW, item.token_ids_BL, item.attention_BL, item.masked_BM):
                    if tensor is not None:
                        tensor.record_stream(torch.cuda.current_stream())
            yield item
    finally:
        stop.set()
        thread.join()


_shards: ShardSet | None = None


def _keep_shards(shards: ShardSet) -> None:
    global _shards
    _shards = shards


def _read_or_substitute_here(draw: Draw, clip: ClipDraw, seed: int) -> tuple[Clip, list[BadSample]]:
    assert _shards is not None
    return read_or_substitute(_shards, draw, clip, seed)


def _read_evaluation(shards: ShardSet, sample: int, draw: ClipDraw) -> Clip | BadSample:
    try:
        return read_clip(shards, sample, draw, None)
    except SampleError as error:
        return bad_sample(shards, sample, error)


def _read_evaluation_here(sample: int, draw: ClipDraw) -> Clip | BadSample:
    assert _shards is not None
    return _read_evaluation(_shards, sample, draw)
