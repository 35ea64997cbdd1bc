"""Frames out of one video, decoded with PyAV: the wanted ones, upright, or a SampleError saying why."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from miles_fast.data.shards import SampleError

# Only containers that hold their media themselves: a playlist (HLS, concat) could name any file or address.
_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg"
_MAX_PIXELS = 8192 * 8192
_HDR_TRANSFERS = {16: "smpte2084 (PQ)", 18: "arib-std-b67 (HLG)"}
# A jump to a key frame refills the decoder's reorder delay; below this many frames it is cheaper to decode
# on.
_JUMP_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What a clip is: sizes after rotation, times from the first frame, a timestamp per chosen frame."""

    num_frames: int
    width: int
    height: int
    duration_seconds: float
    timestamps_seconds: tuple[float, ...]
    rotation: int
    codec: str


def read_frames(
    source: bytes | str | Path,
    choose: Callable[[int], np.ndarray],
    *,
    allow_hdr: bool = False,
    name: str | None = None,
) -> tuple[list[np.ndarray], ClipInfo]:
    """Decode the frames that `choose(num_frames)` names: indices in order of display, which may repeat.

    `source` is a path or the bytes of a file; `name` stands in messages. Frames are (H, W, 3) uint8 RGB;
    rotation is applied, transparency is laid on white. Frames are counted from the packets, never from the
    header. One frame may be missing between decoded neighbours or at the end (hidden and dropped frames): its
    neighbour stands in. The compressed video stream is held in memory and decoded on the calling thread
    alone.

    Raises SampleError: not decodable, no video stream, no decoder, no frames, truncated, frame too large, hdr
    video.
    """
    import av

    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    except OSError as error:
        raise SampleError(f"{name}: cannot be read ({error.strerror})", "not readable") from error
    with file:
        try:
            options = {"format_whitelist": _CONTAINERS}
            with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
                return _read(container, choose, allow_hdr, name)
        except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:
            raise SampleError(f"{name}: cannot be decoded ({error})", "not decodable") from error


def _read(container, choose, allow_hdr: bool, name: str) -> tuple[list[np.ndarray], ClipInfo]:
    from av.video.reformatter import VideoReformatter

    stream = _video_stream(container, name)
    context = stream.codec_context
    if context.width * context.height > _MAX_PIXELS:
        raise SampleError(f"{name}: frames of {context.width}x{context.height} pixels", "frame too large")
    _refuse_hdr(context.color_trc, allow_hdr, name)
    track = _Track(_packets(container, stream, name))
    chosen = np.asarray(choose(track.num_frames), dtype=np.int64).reshape(-1).tolist()
    if not chosen or min(chosen) < 0 or max(chosen) >= track.num_frames:
        raise ValueError(f"{name}: frames {chosen} were chosen out of {track.num_frames}")
    frames = _decode(context, track, sorted(set(chosen)), name)
    first = frames[min(chosen)]
    _refuse_hdr(first.color_trc, allow_hdr, name)
    reformatter = VideoReformatter()
    pictures = {rank: _picture(frame, reformatter) for rank, frame in frames.items()}
    seconds = track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate)
    height, width = pictures[min(chosen)].shape[:2]
    info = ClipInfo(
        num_frames=track.num_frames,
        width=width,
        height=height,
        duration_seconds=seconds[-1],
        timestamps_seconds=tuple(seconds[rank] for rank in chosen),
        rotation=first.rotation,
        codec=context.codec.canonical_name,
    )
    return [pictures[rank] for rank in chosen], info


def _video_stream(container, name: str):
    """The first video stream that is no cover picture, set to decode on this thread."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not int(s.disposition) & int(Disposition.attached_pic)]
    if not streams:
        raise SampleError(f"{name}: holds no video stream", "no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise SampleError(f"{name}: this build of FFmpeg has no decoder for its video", "no decoder")
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    return stream


def _refuse_hdr(transfer: int, allow_hdr: bool, name: str) -> None:
    if not allow_hdr and transfer in _HDR_TRANSFERS:
        raise SampleError(
            f"{name}: HDR video, transfer {_HDR_TRANSFERS[transfer]}, would come out washed out; convert "
            "it to bt709 first, or allow_hdr",
            "hdr video",
        )


def _packets(container, stream, name: str) -> list:
    """All packets of the stream in the order of decoding."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    if all(packet.is_discard for packet in packets):
        raise SampleError(f"{name}: its video stream holds no frames", "no frames")
    # Only mp4 keeps a table of its frames; the counts of other headers are guesses.
    promised = stream.frames if container.format.name.startswith("mov") else 0
    if packets[-1].is_corrupt or len(packets) + 1 < promised:
        raise SampleError(
            f"{name}: ends after {len(packets)} of {promised or 'more'} frames; fetch it again", "truncated"
        )
    return packets


class _Track:
    """Packets of one clip in the order of decoding, and its frames ranked in the order of display.

    Packets without times, or with equal ones, are ranked in the order in which frames leave the decoder.
    """

    def __init__(self, packets: list):
        shown = [packet.pts for packet in packets if not packet.is_discard]
        self.packets = packets
        self.num_frames = len(shown)
        self.timed = None not in shown and len(set(shown)) == len(shown)
        self.times = sorted(shown) if self.timed else []
        self.ranks = {time: rank for rank, time in enumerate(self.times)}
        self.entries = self._entries() if self.timed else [0] * self.num_frames

    def _entries(self) -> list[int]:
        """For each rank the position of the last key packet from which that frame can be decoded."""
        entries = [0] * self.num_frames
        keys: list[tuple[int, int]] = []
        for position, packet in enumerate(self.packets):
            if packet.is_keyframe and packet.pts is not None:
                keys.append((position, packet.pts))
            if not packet.is_discard:
                # A frame shown before the last key packet (open group) still needs the group before it.
                reachable = (start for start, time in reversed(keys[-2:]) if time <= packet.pts)
                entries[self.ranks[packet.pts]] = next(reachable, 0)
        return entries

    def seconds(self, time_base: Fraction, rate: Fraction | None) -> list[float]:
        """Time of every frame from the first one on, and the clip's duration."""
        step = 1 / rate if rate else Fraction(0)
        if not self.timed:
            return [round(float(rank * step), 6) for rank in range(self.num_frames + 1)]
        last = next(
            packet for packet in self.packets if packet.pts == self.times[-1] and not packet.is_discard
        )
        offsets = [(time - self.times[0]) * time_base for time in self.times]
        offsets.append(offsets[-1] + (last.duration * time_base if last.duration else step))
        return [round(float(offset), 6) for offset in offsets]


def _decode(context, track: _Track, wanted: list[int], name: str) -> dict:
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


def _walk(
    context, track: _Track, wanted: list[int], entries: list[int], name: str
) -> tuple[dict, int | None]:
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

    def __init__(self, context, track: _Track, name: str):
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


def _picture(frame, reformatter) -> np.ndarray:
    """RGB pixels of one frame, transparency on white, turned upright."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = reformatter.reformat(frame, format="rgba", threads=1).to_ndarray().astype(np.uint16)
        alpha = pixels[..., 3:]
        picture = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
