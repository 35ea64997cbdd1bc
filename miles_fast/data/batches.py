"""Batches: clips to device tensors, and the record of samples that could not be used."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_fast.config import DataConfig
from miles_fast.data.augmentation import IN_FLIGHT, Augmentation, HardwareDecodeError, build_augmentation
from miles_fast.data.clips import BadSample, Clip, Input
from miles_fast.data.shards import ShardError
from miles_fast.distributed import logger

ENOUGH_SAMPLES = 1000  # before that a share says little


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch: clips, tokens and masks (training) on the device, keys and captions in row order."""

    video_BTCHW: Tensor
    token_ids_BL: Tensor
    attention_BL: Tensor
    masked_BM: Tensor | None
    keys: tuple[str, ...]
    captions: tuple[str, ...]

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the tensors' memory until work queued on `stream` by then is done."""
        for tensor in (self.video_BTCHW, self.token_ids_BL, self.attention_BL, self.masked_BM):
            if tensor is not None:
                tensor.record_stream(stream)


class Quarantine:
    """Counts bad samples by cause and lists each of them once in a JSONL file.

    More than `max_share` of bad samples, counted from a thousand on, ends the run; before, it is warned of
    once.
    """

    def __init__(self, path: Path | None, max_share: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self._path, self._max_share = path, max_share
        self._seen: set[tuple[str, str]] = set()
        self._by_shard: Counter[str] = Counter()
        self._good = 0
        self._warned = False

    def accept(self, good: int) -> None:
        """Count good samples. Raises ShardError where bad ones exceed their share."""
        self._good += good
        bad = self.counts.total()
        if bad <= self._max_share * (bad + self._good):
            return
        if bad + self._good >= ENOUGH_SAMPLES:
            shard, most = self._by_shard.most_common(1)[0]
            raise ShardError(
                f"{bad} of {bad + self._good} samples are unusable ({dict(self.counts)}), {most} of them in "
                f"{shard}: prepare it again with launch/prepare.py, or raise data.max_bad_share "
                f"({self._max_share})"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d samples are unusable (%s), more than data.max_bad_share (%s): the run stops if it "
                "is still so after %d samples",
                bad,
                bad + self._good,
                dict(self.counts),
                self._max_share,
                ENOUGH_SAMPLES,
            )

    def add(self, bad: list[BadSample]) -> None:
        """Count these, and list those not met before."""
        for sample in bad:
            self.counts[sample.cause] += 1
            self._by_shard[sample.shard] += 1
            if self._path is None or (sample.shard, sample.key) in self._seen:
                continue
            self._seen.add((sample.shard, sample.key))
            with open(self._path, "a") as file:
                file.write(json.dumps(asdict(sample)) + "\n")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A batch in the augmentation graph: what it came as, what goes with it, how to read it on the CPU."""

    takes: Input
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    tokens_B2L: Tensor
    masks: Tensor | None
    read_again: Callable[[], Sequence[Clip]]


class BatchFinisher:
    """Clips to device tensors; IN_FLIGHT batches are decoded while the next is read."""

    def __init__(self, data: DataConfig, image_size: int, batch: int, device: torch.device) -> None:
        self._data, self._image_size = data, image_size
        self._batch, self._device = batch, device
        self._graphs: dict[Input, Augmentation] = {}
        self._pending: deque[Decoding] = deque()
        # Its short copies go first: the batch is complete only behind them.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def submit(
        self,
        takes: Input,
        clips: Sequence[Clip],
        masks: np.ndarray | None,
        read_again: Callable[[], Sequence[Clip]],
    ) -> Iterator[Batch]:
        """Queue one batch and yield the one IN_FLIGHT before it.

        `read_again` gives the clips anew, decoded on the CPU: it is called when NVDEC fails.
        """
        if len(self._pending) == IN_FLIGHT:
            yield from self._finish_oldest()
        self._graph(takes).submit([clip.frames for clip in clips], [clip.view for clip in clips])
        self._pending.append(
            Decoding(
                takes=takes,
                masks=torch.from_numpy(masks) if masks is not None else None,
                read_again=read_again,
                **_said(clips),
            )
        )

    def flush(self) -> Iterator[Batch]:
        """Yield the batches that are still being decoded."""
        while self._pending:
            yield from self._finish_oldest()

    def drop(self) -> None:
        """Forget the batches that are still being decoded."""
        while self._pending:
            with contextlib.suppress(HardwareDecodeError):
                self._graph(self._pending.popleft().takes).collect()

    def _finish_oldest(self) -> Iterator[Batch]:
        """The batch that was queued first, unless nothing of it can be read."""
        pending = self._pending.popleft()
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            try:
                video = self._graph(pending.takes).collect()
            except HardwareDecodeError as error:
                logger.warning(
                    "NVDEC failed on a batch (%s): PyAV decodes it. Clips: %s", error, pending.keys
                )
                clips = pending.read_again()
                if not clips:
                    return
                graph = self._graph("pixels")
                graph.submit([clip.frames for clip in clips], [clip.view for clip in clips])
                video, pending = graph.collect(), replace(pending, **_said(clips))
            ids, attention = pending.tokens_B2L.to(self._device, non_blocking=True).unbind(1)
            masks = pending.masks
            if masks is not None:
                masks = masks.to(self._device, non_blocking=True)
            if self._stream:
                self._stream.synchronize()
        yield Batch(
            video_BTCHW=video,
            token_ids_BL=ids,
            attention_BL=attention,
            masked_BM=masks,
            keys=pending.keys,
            captions=pending.captions,
        )

    def _graph(self, takes: Input) -> Augmentation:
        if takes not in self._graphs:
            self._graphs[takes] = build_augmentation(
                self._data.augmentation,
                takes=takes,
                num_clips=self._batch,
                num_frames=self._data.frames_per_clip,
                size=self._image_size,
                device=self._device,
                threads=self._data.threads,
                jpeg_decoder=self._data.jpeg_decoder,
            )
        return self._graphs[takes]


def _said(clips: Sequence[Clip]) -> dict[str, Any]:
    """What of `Decoding` is said of the clips."""
    return {
        "keys": tuple(clip.key for clip in clips),
        "captions": tuple(clip.caption for clip in clips),
        "tokens_B2L": torch.from_numpy(np.stack([clip.tokens for clip in clips])),
    }
