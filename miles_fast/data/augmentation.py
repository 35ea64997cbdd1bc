"""Encoded or decoded frames to normalised tensors: one crop, one flip and one size per clip.

The DALI graph's batch is images (clips x frames), with crop and flip given per image from the sample's own
random stream, so that all frames of a clip share them and a resumed run draws the same. The same graph runs
on the CPU. Videos that NVDEC decodes go through a second graph, whose batch is clips. Without DALI, Pillow
does the same as the first, more slowly.
"""

from __future__ import annotations

import importlib.util
import io
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from miles_fast.data.clips import Frames, Input
from miles_fast.data.sampling import View
from miles_fast.data.videos import EncodedVideo
from miles_fast.distributed import note_once

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Batches decoded at a time. nvJPEG launches two kernels for every image, and each waits for what the step
# has running. An H100's step of 128 clips waited 7 ms with two batches and 0.04 with three; one of view D
# with 256 clips 12.5 with three and 5.5 with four.
IN_FLIGHT = 4


class HardwareDecodeError(RuntimeError):
    """NVDEC could not decode a batch; the graph is ready for the next one."""


class Augmentation(Protocol):
    """Takes batches in (`submit`, at most IN_FLIGHT) and hands tensors out in the same order (`collect`)."""

    def submit(self, clips: Sequence[Frames], views: Sequence[View]) -> None:
        """Queue a batch: the frames of each clip, equally many, and its view; they are copied."""

    def collect(self) -> Tensor:
        """The oldest queued batch: (B, T, 3, H, W), normalised, of `pixel_dtype`."""


def pixel_dtype(device: torch.device) -> torch.dtype:
    """What normalised pixels are handed out in: float32 on the CPU, float16 on a GPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


def build_augmentation(
    kind: Literal["auto", "dali", "pil"],
    *,
    takes: Input,
    num_clips: int,
    num_frames: int,
    size: int,
    device: torch.device,
    threads: int,
    jpeg_decoder: Literal["nvjpeg", "cpu"] = "nvjpeg",
) -> Augmentation:
    """DALI where it is installed, Pillow otherwise; `takes` says what the frames come as.

    `video` takes clips that are still encoded beside decoded ones. `num_clips` is the largest batch;
    `jpeg_decoder` is what a GPU's graph decodes with. Raises ValueError when DALI is needed and missing.
    """
    if _has_dali() and (kind != "pil" or takes == "video"):
        if takes == "video":
            return DaliVideoAugmentation(num_clips, num_frames, size, device, threads)
        return DaliAugmentation(takes, num_clips, num_frames, size, device, threads, jpeg_decoder)
    if kind == "dali" or takes == "video":
        wish = "augmentation = dali" if kind == "dali" else "video_decoder = nvdec"
        raise ValueError(
            f"data.{wish}, but DALI is not installed: pip install 'miles-fast[dali]', or use auto and cpu"
        )
    if kind == "auto":
        note_once("nvidia-dali is not installed: frames are decoded and resized by Pillow instead")
    return PillowAugmentation(num_frames, size, device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even a package called nvidia
        return False


def _crop_flip_normalise(frames: Any, inputs: Any, size: int, gpu: bool, layout: str) -> Any:
    """The end of both graphs; works on images and on sequences of them."""
    from nvidia.dali import fn, types

    frames = fn.resize(
        frames,
        size=(size, size),
        roi_start=inputs("start", types.FLOAT, 1),
        roi_end=inputs("end", types.FLOAT, 1),
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    return fn.crop_mirror_normalize(
        frames,
        mirror=inputs("mirror", types.INT32, 0),
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=types.FLOAT16 if gpu else types.FLOAT,
        output_layout=layout,
    )


class _Graph:
    """A DALI pipeline of one output, run when it is fed."""

    def __init__(self, define: Any, batch: int, device: torch.device, threads: int) -> None:
        from nvidia.dali import fn, pipeline_def

        gpu = device.type == "cuda"

        def inputs(name: str, dtype: Any, ndim: int) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        @pipeline_def(
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # with more, DALI would want several batches before it begins
            exec_dynamic=True,
        )
        def graph():
            return define(inputs, gpu)

        self._pipeline = graph()
        self._pipeline.build()

    def run(self, views: Sequence[View], repeats: int, **arrays: list[np.ndarray]) -> None:
        """Start on `arrays`, and on each view `repeats` times."""

        def spread(values: list, dtype: type) -> np.ndarray:
            return np.repeat(np.array(values, dtype), repeats, axis=0)

        views_arrays = {
            "start": spread([view.start_yx for view in views], np.float32),
            "end": spread([view.end_yx for view in views], np.float32),
            "mirror": spread([view.mirror for view in views], np.int32),
        }
        for name, values in {**arrays, **views_arrays}.items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def collect(self) -> Tensor:
        """The output. RuntimeError where DALI fails; the graph cannot be used then."""
        (images,) = self._pipeline.share_outputs()
        # A copy on this thread's stream: DALI reuses the buffer once the outputs are released.
        batch = torch.from_dlpack(images.as_tensor()).clone()
        if batch.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._pipeline.release_outputs()
        return batch


class _Graphs:
    """IN_FLIGHT pipelines of one graph: while one is fed, the others decode."""

    def __init__(self, define: Any, batch: int, device: torch.device, threads: int) -> None:
        self._build = partial(_Graph, define, batch, device, threads)
        self._free: deque[_Graph | None] = deque([None] * IN_FLIGHT)
        self._busy: deque[_Graph] = deque()

    def run(self, views: Sequence[View], repeats: int, **arrays: list[np.ndarray]) -> None:
        """As `_Graph.run`; at most IN_FLIGHT batches may be on their way."""
        graph = self._free.popleft() or self._build()
        graph.run(views, repeats, **arrays)
        self._busy.append(graph)

    def collect(self) -> Tensor:
        """The oldest batch. RuntimeError where DALI fails; later batches are not touched."""
        graph = self._busy.popleft()
        self._free.append(None)  # DALI's pipeline does not survive a failure
        batch = graph.collect()
        self._free[-1] = graph
        return batch


class DaliAugmentation:
    """`fn.decoders.image` (nvJPEG's hardware engine on a GPU) -> crop and resize -> flip and normalise."""

    def __init__(
        self,
        takes: Input,
        num_clips: int,
        num_frames: int,
        size: int,
        device: torch.device,
        threads: int,
        jpeg_decoder: Literal["nvjpeg", "cpu"] = "nvjpeg",
    ) -> None:
        def define(inputs: Any, gpu: bool) -> Any:
            from nvidia.dali import fn, types

            if takes == "jpeg" and gpu and jpeg_decoder == "nvjpeg":
                image = fn.decoders.image(
                    inputs("image", types.UINT8, 1),
                    device="mixed",
                    output_type=types.RGB,
                    hw_decoder_load=1.0,
                )
            else:
                if takes == "jpeg":
                    encoded = inputs("image", types.UINT8, 1)
                    image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
                else:
                    image = fn.reshape(inputs("image", types.UINT8, 3), layout="HWC")
                image = image.gpu() if gpu else image
            return _crop_flip_normalise(image, inputs, size, gpu, "CHW")

        self._num_frames = num_frames
        self._graphs = _Graphs(define, num_clips * num_frames, device, threads)

    def submit(self, clips: Sequence[Frames], views: Sequence[View]) -> None:
        self._graphs.run(views, self._num_frames, image=[frame for frames in clips for frame in frames])

    def collect(self) -> Tensor:
        return self._graphs.collect().unflatten(0, (-1, self._num_frames))


class DaliVideoAugmentation:
    """`fn.decoders.video` (NVDEC on a GPU) for the clips still encoded, the images' graph for the others."""

    def __init__(
        self, num_clips: int, num_frames: int, size: int, device: torch.device, threads: int
    ) -> None:
        def define(inputs: Any, gpu: bool) -> Any:
            from nvidia.dali import fn, types

            frames = fn.decoders.video(
                inputs("video", types.UINT8, 1),
                device="mixed" if gpu else "cpu",
                frames=inputs("frames", types.INT32, 1),
                pad_mode="none",  # a frame that is not there shortens the clip, which is then refused
            )
            return _crop_flip_normalise(frames, inputs, size, gpu, "FCHW")

        self._encoded = _Graphs(define, num_clips, device, threads)
        self._decoded = DaliAugmentation("pixels", num_clips, num_frames, size, device, threads)
        self._rows: deque[tuple[list[int], list[int]]] = deque()

    def submit(self, clips: Sequence[Frames], views: Sequence[View]) -> None:
        encoded = [row for row, frames in enumerate(clips) if isinstance(frames, EncodedVideo)]
        decoded = [row for row, frames in enumerate(clips) if not isinstance(frames, EncodedVideo)]
        self._rows.append((encoded, decoded))
        if encoded:
            self._encoded.run(
                [views[row] for row in encoded],
                1,
                video=[clips[row].data for row in encoded],
                frames=[clips[row].frames for row in encoded],
            )
        if decoded:
            self._decoded.submit([clips[row] for row in decoded], [views[row] for row in decoded])

    def collect(self) -> Tensor:
        """Raises HardwareDecodeError where the video decoder fails on any clip of the batch."""
        encoded, decoded = self._rows.popleft()
        parts = [self._decoded.collect()] if decoded else []
        if encoded:
            try:
                parts.append(self._encoded.collect())
            except (RuntimeError, ValueError) as error:
                raise HardwareDecodeError(str(error)) from error
        order = torch.tensor([*decoded, *encoded], device=parts[0].device).argsort()
        return torch.cat(parts)[order]


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
        return ((images - mean) / std).to(pixel_dtype(images.device)).unflatten(0, (-1, self._num_frames))

    def _image(self, frame: np.ndarray, view: View) -> np.ndarray:
        from PIL import Image

        image = Image.open(io.BytesIO(frame)) if frame.ndim == 1 else Image.fromarray(frame)
        width, height = image.size
        (top, left), (bottom, right) = view.start_yx, view.end_yx
        box = (left * width, top * height, right * width, bottom * height)
        image = image.convert("RGB").resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image)
        return pixels[:, ::-1].copy() if view.mirror else pixels
