"""Frames out of one video, decoded with PyAV: the wanted ones, upright, or a SampleError saying why."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from miles_fast.data.shards import SampleError
from miles_fast.data.tone_map import HDR_TRANSFERS, refuse_dolby, refuse_hdr, tone_mapped
from miles_fast.data.video_track import Track, pixel_aspect, read_packets, square_size, video_stream

# Only containers that hold their media themselves: a playlist (HLS, concat) could name any file or address.
_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg"
# What NVDEC and DALI 2.4 decode (the names are those of FFmpeg's decoders).
_NVDEC_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4"})
_NVDEC_MIN_SIDE = 144  # pixels: what the H100 takes of every codec
_MAX_PIXELS = 8192 * 8192
# A jump to a key frame refills the decoder's reorder delay; below this many frames it is cheaper to decode
# on.
_JUMP_FRAMES = 4


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
) -> tuple[list[np.ndarray], ClipInfo]:
    """Decode the frames that `choose(num_frames)` names: indices in order of display, which may repeat.

    A choice `ByTime` gets the times of the frames instead of their number.

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
    with _opened(source, name) as container:
        stream, track = _stream_and_track(container, allow_hdr, name)
        seconds = track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate)
        chosen = _chosen(choose, seconds, name)
        return _read(stream, track, chosen, seconds, allow_hdr, name)


@dataclass(frozen=True, kw_only=True)
class EncodedVideo:
    """A video as its file holds it, and which frames are wanted of it, by their rank in display order.

    `height` and `width` are in square pixels, for the shape of crops.
    """

    data: np.ndarray
    frames: np.ndarray
    height: int
    width: int


def locate_frames(source: bytes, choose: Choice, *, name: str | None = None) -> EncodedVideo | None:
    """What NVDEC needs to decode the frames that `read_frames` would, decoding the first one alone.

    None for a video that the hardware would decode to something else or not at all: another codec, more than
    8 bits, other chroma, rotation, hidden frames, frames without times of their own. Raises SampleError for
    what is seen without decoding all: not decodable, no video stream, no frames, truncated, frame too large,
    hdr video.
    """
    name = name or f"{len(source)} bytes"
    with _opened(source, name) as container:
        stream, track = _stream_and_track(container, False, name)
        context = stream.codec_context
        if context.name not in _NVDEC_CODECS or context.pix_fmt not in ("yuv420p", "yuvj420p"):
            return None
        if not track.timed or len(track.packets) != track.num_frames:
            return None
        seconds = track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate)
        chosen = _chosen(choose, seconds, name)
        first = _decode(context, track, [0], name)[0]
        refuse_hdr(first.color_trc, False, name)
        if first.rotation or (first.width, first.height) != (context.width, context.height):
            return None
        if min(first.width, first.height) < _NVDEC_MIN_SIDE:
            return None
        width, height = square_size(first.width, first.height, pixel_aspect(stream, name))
    return EncodedVideo(
        data=np.frombuffer(source, np.uint8),
        frames=np.array(chosen, np.int32),
        height=height,
        width=width,
    )


@contextlib.contextmanager
def _opened(source: bytes | str | Path, name: str) -> Iterator[Any]:
    """The file as a container of FFmpeg's, whose errors are SampleErrors."""
    import av

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    except OSError as error:
        raise SampleError(f"{name}: cannot be read ({error.strerror})", "not readable") from error
    with file:
        try:
            options = {"format_whitelist": _CONTAINERS}
            with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
                yield container
        except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:
            raise SampleError(f"{name}: cannot be decoded ({error})", "not decodable") from error


def _stream_and_track(container, allow_hdr: bool, name: str) -> tuple[Any, Track]:
    stream = video_stream(container, name)
    context = stream.codec_context
    if context.width * context.height > _MAX_PIXELS:
        raise SampleError(f"{name}: frames of {context.width}x{context.height} pixels", "frame too large")
    refuse_hdr(context.color_trc, allow_hdr, name)
    refuse_dolby(context.codec_tag.lower(), name)
    return stream, Track(read_packets(container, stream, name))


def _chosen(choose: Choice, seconds: list[float], name: str) -> list[int]:
    num_frames = len(seconds) - 1
    named = choose.choose(np.array(seconds)) if isinstance(choose, ByTime) else choose(num_frames)
    chosen = np.asarray(named, dtype=np.int64).reshape(-1).tolist()
    if not chosen or min(chosen) < 0 or max(chosen) >= num_frames:
        raise ValueError(f"{name}: frames {chosen} were chosen out of {num_frames}")
    return chosen


def _read(
    stream, track: Track, chosen: list[int], seconds: list[float], allow_hdr: bool, name: str
) -> tuple[list[np.ndarray], ClipInfo]:
    from av.video.reformatter import VideoReformatter

    frames = _decode(stream.codec_context, track, sorted(set(chosen)), name)
    first = frames[min(chosen)]
    refuse_hdr(first.color_trc, allow_hdr, name)
    reformatter = VideoReformatter()
    pictures = {rank: _picture(frame, reformatter, name) for rank, frame in frames.items()}
    height, width = pictures[min(chosen)].shape[:2]
    aspect = pixel_aspect(stream, name)
    square = square_size(first.width, first.height, aspect)
    info = ClipInfo(
        num_frames=track.num_frames,
        width=width,
        height=height,
        duration_seconds=seconds[-1],
        timestamps_seconds=tuple(seconds[rank] for rank in chosen),
        rotation=first.rotation,
        codec=stream.codec_context.codec.canonical_name,
        square_size=square[::-1] if _turns(first.rotation) % 2 else square,
        pixel_aspect=aspect,
    )
    return [pictures[rank] for rank in chosen], info


def _decode(context, track: Track, wanted: list[int], name: str) -> dict:
    """The frame of each wanted rank (sorted), jumping over what need not be decoded."""
    frames, missing = _walk(context, track, wanted, track.entries, name)
    if missing is not None and any(track.entries):
        # A key frame that is none (a wrong flag, a missing reference) costs frames after a jump.
        context.flush_buffers()
        frames, missing = _walk(context, track, wanted, [0] * track.num_frames, name)
    if missing is not None:
        raise SampleError(
            f"{name}: frame {missing} of {track.num_frames} has a packet, but it does not decode",
            "missing frames",
        )
    damaged = [rank for rank, frame in frames.items() if frame.is_corrupt]
    if damaged:
        raise SampleError(f"{name}: frame {damaged[0]} of {track.num_frames} is damaged", "not decodable")
    return frames


def _walk(context, track: Track, wanted: list[int], entries: list[int], name: str) -> tuple[dict, int | None]:
    """Frames by rank, and the first rank that has no decoded frame beside it, if any."""
    found: dict = {}
    feed = _Feed(context, track, name)
    before = at = None
    for rank in wanted:
        if at is None or at[0] < rank:
            if entries[rank] > feed.position + _JUMP_FRAMES:
                feed.jump(entries[rank])
                before = at = None
            while at is None or at[0] < rank:
                before, at = at or before, feed.next()
                if at is None:
                    break
        near = [pair for pair in (at, before) if pair is not None and abs(pair[0] - rank) <= 1]
        if not near:
            return found, rank
        found[rank] = min(near, key=lambda pair: abs(pair[0] - rank))[1]
    return found, None


class _Feed:
    """Feeds packets to the decoder from a position on and hands out (rank, frame) as they come."""

    def __init__(self, context, track: Track, name: str):
        self.context, self.track, self.name = context, track, name
        self.position = 0
        self._ready: list = []
        self._count = 0

    def jump(self, position: int) -> None:
        self.context.flush_buffers()
        self.position = position
        self._ready = []

    def next(self) -> tuple[int, object] | None:
        while not self._ready:
            if self.position > len(self.track.packets):
                return None
            self._ready = [(self._rank(frame), frame) for frame in self._decoded()]
            self._ready = [pair for pair in self._ready if pair[0] is not None]
        return self._ready.pop(0)

    def _rank(self, frame) -> int | None:
        self._count += 1
        if not self.track.timed:
            return self._count - 1
        return self.track.ranks.get(frame.dts if frame.pts is None else frame.pts)

    def _decoded(self) -> list:
        import av

        packets, position = self.track.packets, self.position
        self.position += 1
        try:
            return self.context.decode(packets[position] if position < len(packets) else None)
        except av.error.FFmpegError as error:
            if position == len(packets) - 1:
                return []
            raise SampleError(
                f"{self.name}: packet {position} of {len(packets)} does not decode ({error.strerror})",
                "not decodable",
            ) from error


def _picture(frame, reformatter, name: str) -> np.ndarray:
    """RGB pixels of one frame, HDR mapped, transparency on white, turned upright."""
    turns = _turns(frame.rotation)
    if frame.color_trc in HDR_TRANSFERS:
        frame = tone_mapped(frame, name)
    if any(component.is_alpha for component in frame.format.components):
        pixels = reformatter.reformat(frame, format="rgba", threads=1).to_ndarray().astype(np.uint16)
        alpha = pixels[..., 3:]
        picture = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, turns))  # FFmpeg pads odd rows


def _turns(rotation: int) -> int:
    """Quarter turns to the left that set a picture upright."""
    return round(rotation / 90) % 4
