"""Frames out of one video, decoded with PyAV: the wanted ones, upright, or a SampleError saying why."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
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
    """Decode the frames that `choose(num_frames)` names (indices in order of display; they may repeat).

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
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
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
    frames = _decode_wanted(context, packets, times, wanted, name)
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

    streams = [
        s for s in container.streams.video if not Disposition(s.disposition) & Disposition.attached_pic
    ]
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
        raise SampleError(f"{name}: ends after {len(packets)} of {promised or 'more'} frames", "truncated")
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


def _decode_wanted(context, packets: list, times: np.ndarray, wanted: list[int], name: str) -> dict:
    """Decoded frame for each wanted index (ascending), jumping to a later key packet where one precedes it."""
    ranks = {} if _numbered(packets, times) else {int(time): rank for rank, time in enumerate(times)}
    keys = [(packet.pts, place) for place, packet in enumerate(packets) if packet.is_keyframe and ranks]
    keys = [(pts, place) for pts, place in keys if pts is not None]
    found: dict[int, object] = {}
    fed, shown = 0, 0
    for index in wanted:
        if index in found:
            continue
        entry = max((place for pts, place in keys if pts <= times[index]), default=0)
        if entry > fed:
            context.flush_buffers()
            fed = entry
        while index not in found and fed <= len(packets):
            for frame in context.decode(packets[fed] if fed < len(packets) else None):
                rank = ranks.get(frame.pts, shown) if ranks else shown
                shown = rank + 1
                found[rank] = frame
            fed += 1
        if index not in found:
            near = next((rank for rank in (index - 1, index + 1) if rank in found), None)
            if near is None:
                raise SampleError(
                    f"{name}: frame {index} of {len(times)} is promised by a packet but does not decode",
                    "missing frames",
                )
            found[index] = found[near]
    return {index: found[index] for index in wanted}


def _upright(frame) -> np.ndarray:
    """RGB pixels of a decoded frame, turned upright, transparency laid on white."""
    if "a" in frame.format.name and frame.format.name in ("rgba", "bgra", "argb", "abgr", "yuva420p", "pal8"):
        pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = pixels[..., 3:]
        rgb = ((pixels[..., :3] * alpha + 255 * (255 - alpha)) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb
