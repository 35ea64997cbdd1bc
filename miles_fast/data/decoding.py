"""Files opened and their frames decoded with PyAV, on the calling thread; what fails is a SampleError."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles_fast.data.frame_headers import MAX_FRAME_PIXELS, check_pixels
from miles_fast.data.shards import SampleError
from miles_fast.data.tone_map import refuse_dolby, refuse_hdr
from miles_fast.data.video_track import Track, read_packets, video_stream

# Only containers that hold their media themselves: a playlist (HLS, concat) could name any file or address.
_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg"
# A jump to a key frame refills the decoder's reorder delay; below this many frames it is cheaper to decode
# on.
_JUMP_FRAMES = 4


@contextlib.contextmanager
def opened(source: bytes | str | Path, name: str) -> Iterator[Any]:
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


def stream_and_track(container, allow_hdr: bool, name: str) -> tuple[Any, Track]:
    """The video stream of an opened file and its packets. Raises SampleError."""
    stream = video_stream(container, name)
    context = stream.codec_context
    check_pixels(context.width, context.height, name)
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # what the stream itself may say later on
    refuse_hdr(context.color_trc, allow_hdr, name)
    refuse_dolby(context.codec_tag.lower(), name)
    return stream, Track(read_packets(container, stream, name))


def decode(context, track: Track, wanted: list[int], name: str) -> dict:
    """The frame of each wanted rank (sorted), jumping over what need not be decoded."""
    try:
        return dict(_walk(context, track, wanted, track.entries, name))
    except _MissingFrameError:
        if not any(track.entries):
            raise
    # A key frame that is none (a wrong flag, a missing reference) costs frames after a jump.
    context.flush_buffers()
    return dict(decode_in_order(context, track, wanted, name))


def decode_in_order(context, track: Track, wanted: list[int], name: str) -> Iterator[tuple[int, Any]]:
    """(rank, frame) of each wanted rank (sorted), one in memory at a time, every packet decoded once."""
    return _walk(context, track, wanted, [0] * track.num_frames, name)


class _MissingFrameError(SampleError):
    """A frame whose packet decodes to nothing."""


def _walk(
    context, track: Track, wanted: list[int], entries: list[int], name: str
) -> Iterator[tuple[int, Any]]:
    """(rank, frame) in order. SampleError for the first rank without a sound frame at it or beside it."""
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
            message = f"{name}: frame {rank} of {track.num_frames} has a packet, but it does not decode"
            raise _MissingFrameError(message, "missing frames")
        frame = min(near, key=lambda pair: abs(pair[0] - rank))[1]
        if frame.is_corrupt:
            raise SampleError(f"{name}: frame {rank} of {track.num_frames} is damaged", "not decodable")
        yield rank, frame


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
