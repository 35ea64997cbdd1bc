"""Frames out of one video, decoded with PyAV: the wanted ones, upright, or a SampleError saying why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from miles_fast.data.decoding import decode, opened, stream_and_track
from miles_fast.data.frame_pixels import quarter_turns, upright_rgb
from miles_fast.data.shards import SampleError
from miles_fast.data.tone_map import refuse_hdr
from miles_fast.data.video_track import Track, pixel_aspect, square_size

# What NVDEC and DALI 2.4 decode (the names are those of FFmpeg's decoders).
_NVDEC_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4"})
_NVDEC_MIN_SIDE = 144  # pixels: what the H100 takes of every codec


@dataclass(frozen=True)
class ByTime:
    """A choice of frames that looks at their times.

    `choose` takes (num_frames + 1,) seconds, from 0 on: when each frame appears, and when the last one ends.
    """

    choose: Callable[[np.ndarray], np.ndarray]


Choice = Callable[[int], np.ndarray] | ByTime


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What a clip is: sizes after rotation, times from the first frame, a timestamp per chosen frame.

    `width` and `height` are those of the decoded frames; `square_size` (width, height) is how large the clip
    is in square pixels, where `pixel_aspect` (width by height of a stored pixel, unrotated) is not 1.
    """

    num_frames: int
    width: int
    height: int
    duration_seconds: float
    timestamps_seconds: tuple[float, ...]
    rotation: int
    codec: str
    square_size: tuple[int, int]
    pixel_aspect: Fraction = Fraction(1)


def read_frames(
    source: bytes | str | Path,
    choose: Choice,
    *,
    allow_hdr: bool = False,
    name: str | None = None,
    crop: tuple[int, int] | None = None,
) -> tuple[list[np.ndarray], ClipInfo]:
    """Decode the frames that `choose(num_frames)` names: indices in order of display, which may repeat.

    A choice `ByTime` gets the times of the frames instead of their number. `crop` (width, height) is what a
    remuxed clip shows of its frames (`crop` of its KEY.json).

    `source` is a path or the bytes of a file; `name` stands in messages. Frames are (H, W, 3) uint8 RGB;
    rotation is applied, transparency is laid on white, HDR is mapped to bt709 with `allow_hdr` and refused
    without. Anamorphic pixels stay as they are stored: `square_size` tells the shape to resize to. Frames are
    counted from the packets, never from the header. One frame may be missing between decoded neighbours or at
    the end (hidden and dropped frames): its neighbour stands in. The compressed video stream is held in
    memory and decoded on the calling thread alone.

    Raises SampleError: not decodable, no video stream, no decoder, no frames, truncated, frame too large,
    pixel aspect, hdr video.
    """
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    with opened(source, name) as container:
        stream, track = stream_and_track(container, allow_hdr, name)
        seconds = track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate)
        chosen = _chosen(choose, seconds, name)
        return _read(stream, track, chosen, seconds, allow_hdr, name, crop)


@dataclass(frozen=True, kw_only=True)
class EncodedVideo:
    """A video as its file holds it, and which frames are wanted of it, by their rank in display order.

    `height` and `width` are in square pixels, for the shape of crops; `shown_yx` is the part of the decoded
    frame that they are of, as fractions from its upper left corner.
    """

    data: np.ndarray
    frames: np.ndarray
    height: int
    width: int
    shown_yx: tuple[float, float] = (1.0, 1.0)


def locate_frames(
    source: bytes, choose: Choice, *, name: str | None = None, crop: tuple[int, int] | None = None
) -> EncodedVideo | None:
    """What NVDEC needs to decode the frames that `read_frames` would, decoding the first one alone.

    None for a video that the hardware would decode to something else or not at all: another codec, more than
    8 bits, other chroma, rotation, hidden frames, frames without times of their own. Raises SampleError for
    what is seen without decoding all: not decodable, no video stream, no frames, truncated, frame too large,
    hdr video.
    """
    name = name or f"{len(source)} bytes"
    with opened(source, name) as container:
        stream, track = stream_and_track(container, False, name)
        context = stream.codec_context
        if context.name not in _NVDEC_CODECS or context.pix_fmt not in ("yuv420p", "yuvj420p"):
            return None
        if not track.timed or len(track.packets) != track.num_frames:
            return None
        seconds = track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate)
        chosen = _chosen(choose, seconds, name)
        first = decode(context, track, [0], name)[0]
        refuse_hdr(first.color_trc, False, name)
        if first.rotation or (first.width, first.height) != (context.width, context.height):
            return None
        if min(first.width, first.height) < _NVDEC_MIN_SIDE:
            return None
        shown = _shown(first, crop, name)
        width, height = square_size(*shown, pixel_aspect(stream, name))
    return EncodedVideo(
        data=np.frombuffer(source, np.uint8),
        frames=np.array(chosen, np.int32),
        height=height,
        width=width,
        shown_yx=(shown[1] / first.height, shown[0] / first.width),
    )


def _shown(frame, crop: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """(width, height) of what is shown of a stored frame."""
    if crop is None:
        return frame.width, frame.height
    if not (0 < crop[0] <= frame.width and 0 < crop[1] <= frame.height):
        raise SampleError(
            f"{name}: KEY.json crops it to {crop[0]}x{crop[1]}, its frames have {frame.width}x{frame.height}",
            "wrong crop",
        )
    return crop


def _chosen(choose: Choice, seconds: list[float], name: str) -> list[int]:
    num_frames = len(seconds) - 1
    named = choose.choose(np.array(seconds)) if isinstance(choose, ByTime) else choose(num_frames)
    chosen = np.asarray(named, dtype=np.int64).reshape(-1).tolist()
    if not chosen or min(chosen) < 0 or max(chosen) >= num_frames:
        raise ValueError(f"{name}: frames {chosen} were chosen out of {num_frames}")
    return chosen


def _read(
    stream,
    track: Track,
    chosen: list[int],
    seconds: list[float],
    allow_hdr: bool,
    name: str,
    crop: tuple[int, int] | None,
) -> tuple[list[np.ndarray], ClipInfo]:
    from av.video.reformatter import VideoReformatter

    frames = decode(stream.codec_context, track, sorted(set(chosen)), name)
    first = frames[min(chosen)]
    refuse_hdr(first.color_trc, allow_hdr, name)
    shown = _shown(first, crop, name)
    reformatter = VideoReformatter()
    pictures = {rank: upright_rgb(frame, reformatter, name, crop) for rank, frame in frames.items()}
    height, width = pictures[min(chosen)].shape[:2]
    aspect = pixel_aspect(stream, name)
    square = square_size(*shown, aspect)
    info = ClipInfo(
        num_frames=track.num_frames,
        width=width,
        height=height,
        duration_seconds=seconds[-1],
        timestamps_seconds=tuple(seconds[rank] for rank in chosen),
        rotation=first.rotation,
        codec=stream.codec_context.codec.canonical_name,
        square_size=square[::-1] if quarter_turns(first.rotation) % 2 else square,
        pixel_aspect=aspect,
    )
    return [pictures[rank] for rank in chosen], info
