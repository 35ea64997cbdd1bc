"""Frames out of one video, decoded with PyAV: the wanted ones, upright, or a SampleError that says why not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miles_fast.data.shards import SampleError

# Only containers that hold their media themselves: a playlist (HLS, concat) could name any file or address.
_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg"
_MAX_PIXELS = 8192 * 8192
_HDR_TRANSFERS = {16: "smpte2084 (PQ)", 18: "arib-std-b67 (HLG)"}
# A jump to a key frame refills the decoder's reorder delay; below this many frames it is cheaper to decode on.
_JUMP_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What a clip is: sizes after rotation, times from the first shown frame, one timestamp per chosen frame."""

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
    """Decode the frames that `choose(num_frames)` names (indices in order of display; they may repeat).

    `source` is a path or the bytes of a file; `name` stands in messages. Frames are (H, W, 3) uint8 RGB; rotation
    is applied, transparency is laid on white. Frames are counted from the packets, never from the header. One
    frame may be missing between decoded neighbours or at the end (hidden and dropped frames): its neighbour stands
    in. The compressed video stream is held in memory and decoded on the calling thread alone.

    Raises SampleError: not decodable, no video stream, no decoder, no frames, truncated, frame too large, hdr video.
    """
    import av

    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise SampleError(f"{name}: cannot be read ({error.strerror})", "not readable") from error
    with file:
        try:
            options = {"format_whitelist": _CONTAINERS}
            with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
                return _read(container, choose, allow_hdr, name)
        except (av.error.FFmpegError, UnicodeDecodeError) as error:
            raise SampleError(f"{name}: cannot be decoded ({error})", "not decodable") from error


def _read(container, choose, allow_hdr: bool, name: str) -> tuple[list[np.ndarray], ClipInfo]:
    stream = _video_stream(container, name)
    context = stream.codec_context
    if context.width * context.height > _MAX_PIXELS:
        raise SampleError(f"{name}: frames of {context.width}x{context.height} pixels", "frame too large")
    _refuse_hdr(context.color_trc, allow_hdr, name)
    packets = _packets(container, stream, name)
    times = _display_times(packets)
    chosen = np.asarray(choose(len(times)), dtype=np.int64).reshape(-1)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= len(times):
        raise ValueError(f"{name}: frames {chosen.tolist()} were chosen out of {len(times)}")
    wanted = sorted(set(chosen.tolist()))
    frames = _ByTime(context, packets, times, name).frames(wanted)
    first = next(iter(frames.values()))
    _refuse_hdr(first.color_trc, allow_hdr, name)
    pictures = {index: _upright(frame) for index, frame in frames.items()}
    seconds = _seconds(packets, times, stream)
    height, width = pictures[wanted[0]].shape[:2]
    info = ClipInfo(
        num_frames=len(times),
        width=width,
        height=height,
        duration_seconds=seconds[-1],
        timestamps_seconds=tuple(seconds[index] for index in chosen.tolist()),
        rotation=first.rotation,
        codec=context.codec.canonical_name,
    )
    return [pictures[index] for index in chosen.tolist()], info


def _video_stream(container, name: str):
    """The first video stream that is no cover picture, set to decode on this thread."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not Disposition(s.disposition) & Disposition.attached_pic]
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
            f"{name}: HDR video, transfer {_HDR_TRANSFERS[transfer]}, would come out washed out; convert it to "
            "bt709 first, or allow_hdr",
            "hdr video",
        )


def _packets(container, stream, name: str) -> list:
    """All packets of the stream in the order of decoding."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    if not any(not packet.is_discard for packet in packets):
        raise SampleError(f"{name}: its video stream holds no frames", "no frames")
    promised = stream.frames if container.format.name.startswith("mov") else 0
    if packets[-1].is_corrupt or len(packets) + 1 < promised:
        raise SampleError(
            f"{name}: ends after {len(packets)} of {promised or 'more'} frames; fetch it again", "truncated"
        )
    return packets


def _display_times(packets: list) -> np.ndarray:
    """Presentation time of each frame in order of display; the frame number where packets do not say."""
    shown = [packet.pts for packet in packets if not packet.is_discard]
    if None in shown or len(set(shown)) < len(shown):
        return np.arange(len(shown))
    return np.sort(np.array(shown, dtype=np.int64))


def _seconds(packets: list, times: np.ndarray, stream) -> list[float]:
    """Time of each frame from the first one, then the clip's duration."""
    rate = stream.average_rate or stream.guessed_rate
    if any(packet.pts is None for packet in packets) or stream.time_base is None or _numbered(packets, times):
        step = float(1 / rate) if rate else 0.0
        return [round(index * step, 6) for index in range(len(times) + 1)]
    scale = stream.time_base
    last = next(packet for packet in packets if packet.pts == times[-1])
    end = times[-1] + (last.duration or 0) if last.duration or not rate else times[-1] + int(1 / rate / scale)
    return [round(float(int(time - times[0]) * scale), 6) for time in (*times, end)]


def _numbered(packets: list, times: np.ndarray) -> bool:
    shown = [packet.pts for packet in packets if not packet.is_discard]
    return len(set(shown)) < len(shown)


class _ByTime:
    """The decoder on its way through the packets of one clip."""

    def __init__(self, context, packets: list, times: np.ndarray, name: str):
        self.context, self.packets, self.times, self.name = context, packets, times, name
        pts = [packet.pts for packet in packets if not packet.is_discard]
        self.timed = None not in pts and len(set(pts)) == len(pts)
        self.ranks = {int(time): rank for rank, time in enumerate(times)} if self.timed else {}

    def frames(self, wanted: list[int]) -> dict[int, object]:
        """Decoded frame for each wanted index (sorted), jumping over what need not be decoded."""
        try:
            return self._walk(wanted, jump=self.timed)
        except SampleError as error:
            # A key frame that is none (a wrong flag, an open group) costs frames after a jump: decode it all.
            if error.cause != "missing frames" or not self.timed:
                raise
        return self._walk(wanted, jump=False)

    def _walk(self, wanted: list[int], jump: bool) -> dict[int, object]:
        found: dict[int, object] = {}
        self._restart(0)
        previous = current = None
        for rank in wanted:
            start = self._entry(rank) if jump else 0
            if start > self.fed + _JUMP_FRAMES and (current is None or current[0] < rank):
                self._restart(start)
                previous = current = None
            while current is None or current[0] < rank:
                previous, current = current or previous, next(self.decoded, None)
                if current is None:
                    break
            found[rank] = self._nearest(rank, previous, current)
            current = current or previous
        return found

    def _nearest(self, rank: int, previous, current):
        for near in (current, previous):
            if near is not None and abs(near[0] - rank) <= (1 if near[0] != rank else 0):
                return near[1]
        raise SampleError(
            f"{self.name}: frame {rank} of {len(self.times)} is promised by a packet but does not decode",
            "missing frames",
        )

    def _entry(self, rank: int) -> int:
        """Position of the last key packet from which this frame can be decoded."""
        time = int(self.times[rank])
        return self._entries[self._positions[time]]

    def _restart(self, start: int) -> None:
        self.context.flush_buffers()
        self.fed = start
        self.decoded = self._decode()

    def _decode(self) -> Iterator[tuple[int, object]]:
        raise NotImplementedError
