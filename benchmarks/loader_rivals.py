"""What people would otherwise use to feed the step, on the same shards and the same augmentation.

Both give float32 (B, T, 3, S, S) clips, cropped, flipped and normalised, with captions; neither tokenises.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles_fast.config import Config
from miles_fast.data.augmentation import PillowAugmentation
from miles_fast.data.sampling import segment_frames, training_view

CPU = torch.device("cpu")


class _VideoClips(torch.utils.data.Dataset):
    """Clips of mp4 shards by number, decoded by PyAV: a dataset as it stands in most repositories."""

    def __init__(self, paths: Sequence[Path], config: Config) -> None:
        from miles_fast.data.shards import ShardSet

        self._shards, self._config = ShardSet(paths), config

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        from miles_fast.data.videos import read_frames

        sample, data = self._shards[number], self._config.data
        stream = np.random.default_rng(number)
        frames, _ = read_frames(
            sample.read(sample.video_extension()),
            lambda count: segment_frames(count, data.frames_per_clip, stream),
        )
        return _augment(frames, stream, self._config), sample.captions()[0]


def _augment(frames: list[np.ndarray], stream: np.random.Generator, config: Config) -> torch.Tensor:
    view = training_view(stream, *frames[0].shape[:2], config.data.crop_scale, config.data.flip)
    augmentation = PillowAugmentation(len(frames), config.model.video.image_size, CPU)
    augmentation.submit([frames], [view])
    return augmentation.collect()[0]


def torch_dataloader(paths: Sequence[Path], config: Config, batch: int, workers: int) -> Iterator[Any]:
    """torch's DataLoader over mp4 shards, PyAV in its workers."""
    loader = torch.utils.data.DataLoader(
        _VideoClips(paths, config),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
        prefetch_factor=4,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def webdataset_pillow(paths: Sequence[Path], config: Config, batch: int, workers: int) -> Iterator[Any]:
    """webdataset over frame shards: tars read from front to back, JPEGs decoded by Pillow in the workers."""
    import webdataset

    def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
        from PIL import Image

        stream = np.random.default_rng()
        names = sorted(name for name in sample if name.endswith("jpg"))
        chosen = segment_frames(len(names), config.data.frames_per_clip, stream)
        frames = [np.asarray(Image.open(io.BytesIO(sample[names[i]])).convert("RGB")) for i in chosen]
        return _augment(frames, stream, config), sample["txt"].decode()

    dataset = (
        webdataset.WebDataset([str(path) for path in paths], resampled=True, shardshuffle=False)
        .shuffle(256)
        .map(decode)
        .batched(batch, partial=False)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4))


def clips_per_second(batches: Iterator[Any], batch: int, seconds: float) -> float:
    """Clips/s of a loader over about `seconds`, after its first three batches."""
    for _ in range(3):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch
    return count / (time.perf_counter() - start)
