"""HDR video (PQ and HLG transfers) to the range of an ordinary screen, by libswscale through libavfilter."""

from __future__ import annotations

import functools
from fractions import Fraction

from miles_fast.data.shards import SampleError

HDR_TRANSFERS = {16: "smpte2084", 18: "arib-std-b67"}  # PQ and HLG, by FFmpeg's numbers and names
_BT709 = "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709:out_range=tv"
# By FFmpeg's numbers; what is not marked (2) is taken as BT.2020, which both transfers come with.
_PRIMARIES = {1: "bt709", 2: "bt2020", 9: "bt2020", 12: "smpte432"}
_MATRICES = {1: "bt709", 2: "bt2020", 9: "bt2020"}
# Dolby Vision without a base layer that others can show: its colours are not what the stream calls them.
_DOLBY_TAGS = frozenset({"dvh1", "dvhe", "dva1", "dvav", "dav1"})


def refuse_hdr(transfer: int, allow_hdr: bool, name: str) -> None:
    """Raise SampleError `hdr video` for an HDR transfer that nobody said to map."""
    if not allow_hdr and transfer in HDR_TRANSFERS:
        raise SampleError(
            f"{name}: HDR video, transfer {HDR_TRANSFERS[transfer]}, would come out washed out; prepare it "
            "with --allow-hdr, which maps it to bt709",
            "hdr video",
        )


def refuse_dolby(tag: str, name: str) -> None:
    """Raise SampleError `hdr video` for what only a Dolby Vision decoder shows as it was meant."""
    if tag in _DOLBY_TAGS:
        raise SampleError(f"{name}: Dolby Vision video ({tag}); convert it to bt709 first", "hdr video")


def missing_tone_map() -> str | None:
    """What this FFmpeg lacks to map tones, or None. Cheap: no table is built."""
    import av

    try:
        _graph(64, 64, "yuv420p", "", _BT709)
    except (av.error.FFmpegError, ValueError) as error:
        return (
            f"this PyAV's FFmpeg {'.'.join(map(str, av.library_versions['libavfilter']))} cannot convert "
            f"transfers ({error}): install av>=17.1"
        )
    return None


def tone_mapped(frame, name: str):
    """An HDR frame as a bt709 one (yuv444p, limited range): primaries, brightness and transfer converted.

    The first frame of each size costs some seconds, in which libswscale computes its table of colours.
    Raises SampleError `hdr video` for colours that are not BT.2020, P3 or BT.709.
    """
    if frame.color_primaries not in _PRIMARIES or frame.colorspace not in _MATRICES:
        raise SampleError(
            f"{name}: HDR video with primaries {frame.color_primaries} and matrix {frame.colorspace} "
            "(FFmpeg's numbers), which are not mapped; convert it to bt709 first",
            "hdr video",
        )
    source = (
        f"in_transfer={HDR_TRANSFERS[frame.color_trc]}:in_primaries={_PRIMARIES[frame.color_primaries]}:"
        f"in_color_matrix={_MATRICES[frame.colorspace]}:in_range={'pc' if frame.color_range == 2 else 'tv'}:"
        "intent=perceptual"
    )
    graph = _graph(frame.width, frame.height, frame.format.name, source, _BT709)
    graph.push(frame)
    return graph.pull()


@functools.lru_cache(maxsize=8)
def _graph(width: int, height: int, pixel_format: str, source: str, target: str):
    import av

    graph = av.filter.Graph()
    graph.threads = 1
    start = graph.add_buffer(width=width, height=height, format=pixel_format, time_base=Fraction(1, 90000))
    scale = graph.add("scale", f"{source}:{target}".lstrip(":"))
    pixels = graph.add("format", "pix_fmts=yuv444p")
    end = graph.add("buffersink")
    for one, next_one in ((start, scale), (scale, pixels), (pixels, end)):
        one.link_to(next_one)
    graph.configure()
    return graph
