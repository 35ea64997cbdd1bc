"""One clip as the members of a video shard that NVDEC takes well: remuxed as it is, or encoded anew.

DALI keeps its NVDEC decoders by size, but compares the shown size of one clip with the coded size of the
next: where they differ every clip makes a new decoder (~80 ms), so both kinds of video are shown as they are
coded.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from miles_fast.data.clip_sources import SourceClip
from miles_fast.data.decoding import decode, decode_in_order, opened, stream_and_track
from miles_fast.data.frame_pixels import quarter_turns, upright_rgb
from miles_fast.data.sampling import timed_frames
from miles_fast.data.shards import SampleError
from miles_fast.data.tone_map import HDR_TRANSFERS, refuse_hdr
from miles_fast.data.video_track import Track, pixel_aspect, square_size

_NO_CROPPING = "crop_left=0:crop_right=0:crop_top=0:crop_bottom=0"
_FILTERS = {"h264": f"h264_metadata={_NO_CROPPING}", "hevc": f"hevc_metadata={_NO_CROPPING}"}
_REMEDY = "prepare it with --transcode, or as frames"
_TICKS = 90000  # a second, of a transcoded video whose frames keep their times
_X264 = {
    "preset": "veryfast",
    "crf": "23",
    "threads": "1",  # with more, and with mbtree's lookahead threads, the bytes depend on the machine
    "x264-params": "mbtree=0:scenecut=0:bframes=0:lookahead-threads=1:sliced-threads=0",
}


class VideoOptions(Protocol):
    """What `encode_video` needs to know; PreparationOptions has it."""

    layout: str
    fps: float | None
    short_side: int
    gop: int
    allow_hdr: bool


@dataclass(frozen=True, kw_only=True)
class _Video:
    """An mp4; `crop` (width, height) where not all of its frames is to be shown; what it came from."""

    data: bytes
    num_frames: int
    size: tuple[int, int]
    crop: tuple[int, int] | None
    source: dict


def encode_video(key: str, clip: SourceClip, options: VideoOptions) -> dict[str, bytes]:
    """Members by extension: mp4, txt (the first caption) and json with the video's checksum.

    layout `remux` keeps the compressed frames of H.264 and HEVC and drops the cropping from their headers;
    `crop` of the json is what is to be shown then. `transcode` decodes and encodes to H.264. Raises
    SampleError.
    """
    if clip.video is None:
        raise SampleError(f"{clip.name}: is pictures, not a video; prepare it as frames", "no video")
    if options.layout == "remux":
        made = _remux(clip)
    else:
        made = _transcode(clip, options)
    record = {
        "key": key,
        "num_frames": made.num_frames,
        "width": made.size[0],
        "height": made.size[1],
        "video_crc32": zlib.crc32(made.data),
        "source": {**clip.source, "name": clip.name, **made.source},
    }
    if made.crop is not None:
        record["crop"] = list(made.crop)
    return {"mp4": made.data, **clip.texts(record)}


def _remux(clip: SourceClip) -> _Video:
    import av

    name = clip.name
    with opened(clip.video, name) as container:
        stream, track = stream_and_track(container, False, name)
        context = stream.codec_context
        _refuse_to_remux(context.name, track, name)
        first = decode(context, track, [0], name)[0]
        refuse_hdr(first.color_trc, False, name)
        if quarter_turns(first.rotation):
            raise SampleError(f"{name}: is turned by {first.rotation} degrees; {_REMEDY}", "rotated")
        shown = clip.crop or (first.width, first.height)
        coded = context.coded_width, context.coded_height
        source = _source(stream, track, shown, name)
        reference = _planes(first)
        try:
            data = _copied(stream, track, coded)  # the packets are another stream's from here on
        except av.error.FFmpegError as error:
            message = f"{name}: its packets do not go into an mp4 ({error.strerror}); {_REMEDY}"
            raise SampleError(message, "not remuxed") from error
    _check_copy(data, track, coded, reference, name)
    return _Video(
        data=data,
        num_frames=track.num_frames,
        size=coded,
        crop=None if shown == coded else shown,
        source=source,
    )


def _refuse_to_remux(codec: str, track: Track, name: str) -> None:
    if codec not in _FILTERS:
        message = f"{name}: is {codec}; only H.264 and HEVC are remuxed: {_REMEDY}"
        raise SampleError(message, "codec not remuxed")
    if len(track.packets) != track.num_frames:
        hidden = len(track.packets) - track.num_frames
        raise SampleError(f"{name}: an edit list hides {hidden} of its frames; {_REMEDY}", "hidden frames")
    if not track.timed:
        raise SampleError(f"{name}: its frames have no times of their own; {_REMEDY}", "no frame times")


def _copied(stream, track: Track, coded: tuple[int, int]) -> bytes:
    """The packets in an mp4 of their own, which shows the whole coded picture."""
    import av
    from av.bitstream import BitStreamFilterContext

    if any(packet.dts is None for packet in track.packets):  # Matroska keeps display times alone
        late = max(time - packet.pts for time, packet in zip(track.times, track.packets, strict=True))
        for time, packet in zip(track.times, track.packets, strict=True):
            packet.dts = time - late
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        copy = output.add_stream_from_template(stream)
        uncropped = BitStreamFilterContext(_FILTERS[stream.codec_context.name], stream, copy)
        copy.time_base = stream.time_base
        copy.codec_context.width, copy.codec_context.height = coded
        for packet in [*track.packets, None]:
            for changed in uncropped.filter(packet):
                changed.stream = copy
                output.mux(changed)
    return buffer.getvalue()


def _check_copy(
    data: bytes, track: Track, coded: tuple[int, int], first: list[np.ndarray], name: str
) -> None:
    """Refuse a copy that would be shown otherwise than its original."""
    with opened(data, name) as container:
        stream, copied = stream_and_track(container, False, name)
        frame = decode(stream.codec_context, copied, [0], name)[0]
        planes = _planes(frame)
        if copied.num_frames != track.num_frames or (frame.width, frame.height) != coded:
            raise SampleError(
                f"{name}: its copy has {copied.num_frames} frames of {frame.width}x{frame.height}, not "
                f"{track.num_frames} of {coded[0]}x{coded[1]}; {_REMEDY}",
                "not remuxed",
            )
    parts = (plane[: wanted.shape[0], : wanted.shape[1]] for plane, wanted in zip(planes, first, strict=True))
    if not all(np.array_equal(part, wanted) for part, wanted in zip(parts, first, strict=True)):
        message = f"{name}: its picture does not begin in the upper left corner of its frames; {_REMEDY}"
        raise SampleError(message, "crop inside the frame")


def _planes(frame) -> list[np.ndarray]:
    """The decoder's own samples, row by row, as bytes."""
    samples = zip(frame.planes, frame.format.components, strict=True)
    return [
        np.frombuffer(plane, np.uint8)
        .reshape(-1, plane.line_size)[: plane.height, : plane.width * -(-component.bits // 8)]
        .copy()
        for plane, component in samples
    ]


def _transcode(clip: SourceClip, options: VideoOptions) -> _Video:
    import av

    name = clip.name
    with opened(clip.video, name) as container:
        stream, track = stream_and_track(container, options.allow_hdr, name)
        seconds = np.array(track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate))
        wanted, times, rate = _timeline(seconds, options.fps)
        frames = decode_in_order(stream.codec_context, track, sorted(set(wanted)), name)
        rank, frame = next(frames)
        refuse_hdr(frame.color_trc, options.allow_hdr, name)
        shown = clip.crop or (frame.width, frame.height)
        square = square_size(*shown, pixel_aspect(stream, name))
        size = _coded_size(square[::-1] if quarter_turns(frame.rotation) % 2 else square, options.short_side)
        source = _source(stream, track, shown, name)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
            encoder = _encoder(output, size, rate, options.gop, _colours(frame, clip.crop))
            reformatter = _reformatter()
            position = 0
            while True:
                picture = _scaled(frame, reformatter, size, clip.crop, name)
                while position < len(wanted) and wanted[position] == rank:
                    picture.pts, picture.time_base = times[position], encoder.codec_context.time_base
                    output.mux(encoder.encode(picture))
                    position += 1
                if position == len(wanted):
                    break
                rank, frame = next(frames)
            output.mux(encoder.encode(None))
    return _Video(data=buffer.getvalue(), num_frames=len(wanted), size=size, crop=None, source=source)


def _timeline(seconds: np.ndarray, fps: float | None) -> tuple[list[int], list[int], Fraction]:
    """Ranks of the frames to encode, their times in ticks, and the ticks of a second.

    With a rate, one frame for each of its periods, but never more frames than there are; without one, every
    frame at its own time.
    """
    available, length = len(seconds) - 1, float(seconds[-1])
    if fps is None or length <= 0:
        return list(range(available)), np.round(seconds[:-1] * _TICKS).astype(int).tolist(), Fraction(_TICKS)
    count = min(available, max(1, round(length * fps)))
    rate = Fraction(fps if count < available else available / length).limit_denominator(1001)
    return timed_frames(seconds, count).tolist(), list(range(count)), rate


def _coded_size(square: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height with the short side brought down to `short_side`, to the nearest multiples of 16."""
    scale = min(1.0, short_side / min(square))
    return tuple(max(16, 16 * round(side * scale / 16)) for side in square)  # type: ignore[return-value]


def _encoder(output, size: tuple[int, int], ticks: Fraction, gop: int, colours: tuple[int, int, int]):
    stream = output.add_stream(
        "libx264", rate=ticks, options={**_X264, "g": str(gop), "keyint_min": str(gop)}
    )
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = stream.time_base = 1 / ticks
    context.color_range = 1
    context.colorspace, context.color_primaries, context.color_trc = colours
    return stream


def _is_plain(frame, crop: tuple[int, int] | None) -> bool:
    """Whether only the frame's size has to change: upright, all of it shown, YUV of limited range, no HDR."""
    by_hand = frame.rotation or crop or frame.color_range == 2 or frame.color_trc in HDR_TRANSFERS
    return not by_hand and not frame.format.is_rgb and len(frame.format.components) == 3


def _colours(frame, crop: tuple[int, int] | None) -> tuple[int, int, int]:
    """Matrix, primaries and transfer of what `_scaled` gives, in FFmpeg's numbers; 1 is bt709."""
    if not _is_plain(frame, crop):
        return 1, 1, 1
    return frame.colorspace, frame.color_primaries, frame.color_trc


def _scaled(frame, reformatter, size: tuple[int, int], crop: tuple[int, int] | None, name: str):
    """The frame as an encoder takes it: upright, limited yuv420p of the given (width, height).

    The colours of a plain frame stay the ones they are, whose conversion would cost a level or two.
    """
    import av
    from av.video.reformatter import Interpolation
    from PIL import Image

    to = {"format": "yuv420p", "interpolation": Interpolation.BICUBIC, "threads": 1}
    if _is_plain(frame, crop):
        return reformatter.reformat(frame, width=size[0], height=size[1], **to)
    image = Image.fromarray(upright_rgb(frame, _reformatter(), name, crop))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    picture = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
    scaled = reformatter.reformat(picture, dst_colorspace="ITU709", dst_color_range="MPEG", **to)
    scaled.colorspace = scaled.color_primaries = scaled.color_trc = scaled.color_range = 1
    return scaled


def _reformatter():
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _source(stream, track: Track, shown: tuple[int, int], name: str) -> dict:
    """What KEY.json says of the video that was read."""
    seconds = track.seconds(stream.time_base, stream.average_rate or stream.guessed_rate)
    aspect = pixel_aspect(stream, name)
    source = {
        "codec": stream.codec_context.codec.canonical_name,
        "num_frames": track.num_frames,
        "duration_seconds": seconds[-1],
        "width": shown[0],
        "height": shown[1],
    }
    if aspect != 1:
        source["pixel_aspect"] = f"{aspect.numerator}:{aspect.denominator}"
    return source
