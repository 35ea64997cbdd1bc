"""One clip as the members of a frame shard: the frames shown at even times as JPEG, its caption, its json."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from miles_fast.data.clip_sources import SourceClip
from miles_fast.data.sampling import segment_frames, timed_frames
from miles_fast.data.shards import SampleError
from miles_fast.data.videos import ByTime, ClipInfo, read_frames


class FrameOptions(Protocol):
    """What `encode_clip` needs to know; PreparationOptions has it."""

    frames: int
    fps: float | None
    max_frames: int
    short_side: int
    quality: int
    allow_hdr: bool


def encode_clip(key: str, clip: SourceClip, options: FrameOptions) -> dict[str, bytes]:
    """Members by extension: 00.jpg ..., txt (the first caption) and json. Raises SampleError.

    Frames are the ones shown at the middle of equal segments of the clip's time: `frames` segments, or with
    `fps` as many as last 1 / fps s each, `max_frames` at most. A clip with fewer frames than asked for keeps
    each once. All frames have the size of the first one in square pixels, its short side brought down to
    `short_side`.
    """
    most = options.frames if options.fps is None else options.max_frames

    def choose(seconds: np.ndarray) -> np.ndarray:
        if options.fps is None:
            return timed_frames(seconds, most)
        return timed_frames(seconds, min(most, max(1, round(float(seconds[-1]) * options.fps))))

    def choose_picture(available: int) -> np.ndarray:
        return segment_frames(available, min(most, available))

    if clip.video is not None:
        arrays, info = read_frames(
            clip.video, ByTime(choose), allow_hdr=options.allow_hdr, name=clip.name, crop=clip.crop
        )
        frames = [Image.fromarray(array) for array in arrays]
    else:
        frames, info = _pictures(clip, choose_picture)
    size = _fit(info.square_size, options.short_side)
    jpegs = [_jpeg(frame, size, options.quality) for frame in frames]
    record = {
        "key": key,
        "num_frames": len(jpegs),
        "width": size[0],
        "height": size[1],
        "timestamps_seconds": list(info.timestamps_seconds),
        "crc32": [zlib.crc32(jpeg) for jpeg in jpegs],
        "source": {
            **clip.source,
            "name": clip.name,
            "codec": info.codec,
            "num_frames": info.num_frames,
            "duration_seconds": info.duration_seconds,
            "width": info.width,
            "height": info.height,
        },
    }
    if info.pixel_aspect != 1:
        record["source"]["pixel_aspect"] = f"{info.pixel_aspect.numerator}:{info.pixel_aspect.denominator}"
    digits = max(2, len(str(most - 1)))
    return {f"{number:0{digits}d}.jpg": jpeg for number, jpeg in enumerate(jpegs)} | clip.texts(record)


def _pictures(clip: SourceClip, choose: Callable[[int], np.ndarray]) -> tuple[list[Image.Image], ClipInfo]:
    """The chosen ones of a clip that comes as pictures; they carry no times."""
    frames = [_open(clip.pictures[index], clip.name) for index in choose(len(clip.pictures))]
    info = ClipInfo(
        num_frames=len(clip.pictures),
        width=frames[0].width,
        height=frames[0].height,
        duration_seconds=0.0,
        timestamps_seconds=(0.0,) * len(frames),
        rotation=0,
        codec="image",
        square_size=frames[0].size,
    )
    return frames, info


def _open(picture: bytes | Path, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                return Image.alpha_composite(white, upright).convert("RGB")
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: the picture does not decode ({error})", "not decodable") from error


def _fit(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = min(1.0, short_side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _jpeg(frame: Image.Image, size: tuple[int, int], quality: int) -> bytes:
    if frame.size != size:
        frame = frame.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    try:
        frame.save(buffer, "JPEG", quality=quality)
    except OSError as error:
        message = f"frames of {size[0]}x{size[1]} pixels cannot be stored as JPEG ({error})"
        raise SampleError(message, "frame too large") from error
    return buffer.getvalue()
