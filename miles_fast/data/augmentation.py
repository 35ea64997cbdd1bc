"""Encoded or decoded frames to normalised tensors: one crop, one flip and one size per clip.

The DALI graph's batch is images (clips x frames), with crop and flip given per image from the sample's own
random stream, so that all frames of a clip share them and a resumed run draws the same. The same graph runs
on the CPU. Without DALI, Pillow does the same, more slowly.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from miles_fast.data.sampling import View
from miles_fast.distributed import note_once

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Frames = Sequence[bytes] | Sequence[np.ndarray]


class Augmentation(Protocol):
    """Takes batches in (`submit`) and hands tensors out in the same order (`collect`)."""

    def submit(self, clips: Sequence[Frames], views: Sequence[View]) -> None:
        """Queue a batch: per clip equally many frames (JPEG bytes, or (H, W, 3) uint8) and its view."""

    def collect(self) -> Tensor:
        """The oldest queued batch: (B, T, 3, H, W), normalised; float32 on the CPU, float16 on a GPU."""


def build_augmentation(
    kind: Literal["auto", "dali", "pil"],
    *,
    encoded: bool,
    num_images: int,
    num_frames: int,
    size: int,
    device: torch.device,
    threads: int,
) -> Augmentation:
    """DALI where it is installed, Pillow otherwise; `encoded` says whether frames come as JPEG bytes.

    `num_images` is the largest number of images (clips x frames) of a batch. Raises ValueError when DALI is
    asked for by name and missing.
    """
    if kind != "pil" and importlib.util.find_spec("nvidia.dali") is not None:
        return DaliAugmentation(encoded, num_images, num_frames, size, device, threads)
    if kind == "dali":
        raise ValueError(
            "data.augmentation = dali, but DALI is not installed: pip install 'miles-fast[dali]', or use auto"
        )
    if kind == "auto":
        note_once("nvidia-dali is not installed: frames are decoded and resized by Pillow instead")
    return PillowAugmentation(num_frames, size, device)


class DaliAugmentation:
    """`fn.decoders.image` (nvJPEG's hardware engine on a GPU) -> crop and resize -> flip and normalise."""

    def __init__(
        self, encoded: bool, num_images: int, num_frames: int, size: int, device: torch.device, threads: int
    ) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self._num_frames, self._device = num_frames, device
        gpu = device.type == "cuda"

        @pipeline_def(
            batch_size=num_images,
            num_threads=threads,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # the caller submits a batch when it has collected the one before
            exec_dynamic=True,
        )
        def graph():
            image = fn.external_source(name="image", dtype=types.UINT8, ndim=1 if encoded else 3)
            start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
            end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            if encoded:
                image = fn.decoders.image(
                    image, device="mixed" if gpu else "cpu", output_type=types.RGB, hw_decoder_load=1.0
                )
            else:
                image = fn.reshape(image, layout="HWC")
                image = image.gpu() if gpu else image
            image = fn.resize(
                image,
                size=(size, size),
                roi_start=start,
                roi_end=end,
                roi_relative=True,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            return fn.crop_mirror_normalize(
                image,
                mirror=mirror,
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
                dtype=types.FLOAT16 if gpu else types.FLOAT,
                output_layout="CHW",
            )

        self._pipeline = graph()
        self._pipeline.build()

    def submit(self, clips: Sequence[Frames], views: Sequence[View]) -> None:
        images = [_as_array(frame) for frames in clips for frame in frames]
        per_image = [view for frames, view in zip(clips, views, strict=True) for _ in frames]
        feed = self._pipeline.feed_input
        feed("image", images)
        feed("start", [np.array(view.start_yx, np.float32) for view in per_image])
        feed("end", [np.array(view.end_yx, np.float32) for view in per_image])
        feed("mirror", [np.array(view.mirror, np.int32) for view in per_image])
        self._pipeline.schedule_run()

    def collect(self) -> Tensor:
        (images,) = self._pipeline.share_outputs()
        # A copy on this thread's stream: DALI reuses the buffer once the outputs are released.
        batch = torch.from_dlpack(images.as_tensor()).clone()
        if batch.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._pipeline.release_outputs()
        return batch.unflatten(0, (-1, self._num_frames))


class PillowAugmentation:
    """The same crop, antialiased bilinear resize, flip and normalisation by Pillow, on the calling thread."""

    def __init__(self, num_frames: int, size: int, device: torch.device) -> None:
        self._num_frames, self._size, self._device = num_frames, size, device
        self._queue: list[Tensor] = []

    def submit(self, clips: Sequence[Frames], views: Sequence[View]) -> None:
        arrays = [
            self._image(frame, view) for frames, view in zip(clips, views, strict=True) for frame in frames
        ]
        self._queue.append(torch.from_numpy(np.stack(arrays)))

    def collect(self) -> Tensor:
        images = self._queue.pop(0).to(self._device).permute(0, 3, 1, 2).float().div(255)
        mean = torch.tensor(MEAN, device=images.device)[:, None, None]
        std = torch.tensor(STD, device=images.device)[:, None, None]
        dtype = torch.float16 if images.is_cuda else torch.float32
        return ((images - mean) / std).to(dtype).unflatten(0, (-1, self._num_frames))

    def _image(self, frame: bytes | np.ndarray, view: View) -> np.ndarray:
        from PIL import Image

        image = Image.open(io.BytesIO(frame)) if isinstance(frame, bytes) else Image.fromarray(frame)
        width, height = image.size
        (top, left), (bottom, right) = view.start_yx, view.end_yx
        box = (left * width, top * height, right * width, bottom * height)
        image = image.convert("RGB").resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image)
        return pixels[:, ::-1].copy() if view.mirror else pixels


def _as_array(frame: bytes | np.ndarray) -> np.ndarray:
    return np.frombuffer(frame, np.uint8) if isinstance(frame, bytes) else frame
