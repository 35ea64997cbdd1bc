"""The video stream of an opened file: chosen, read into packets, and its frames ranked for display."""

from __future__ import annotations

from fractions import Fraction

from miles_fast.data.shards import SampleError

_MAX_PIXEL_ASPECT = 8  # beyond that a header is wrong rather than a lens anamorphic


def video_stream(container, name: str):
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


def pixel_aspect(stream, name: str) -> Fraction:
    """Width of a stored pixel by its height; the container's word goes before the codec's."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        raise SampleError(
            f"{name}: its header wants pixels {aspect.numerator}:{aspect.denominator} wide; correct it "
            "(`ffmpeg -i IN -c copy -aspect W:H OUT`)",
            "pixel aspect",
        )
    return aspect


def square_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """(width, height) in square pixels of a picture as it is stored; nothing is made smaller."""
    if aspect >= 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def read_packets(container, stream, name: str) -> list:
    """All packets of the stream in the order of decoding."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    if all(packet.is_discard for packet in packets):
        raise SampleError(f"{name}: its video stream holds no frames", "no frames")
    # Only mp4 keeps a table of its frames; the counts of other headers are guesses. The index has what an
    # edit list leaves of that table, and what the fragments seen so far add to it.
    promised = len(stream.index_entries) if container.format.name.startswith("mov") else 0
    if packets[-1].is_corrupt or len(packets) + 1 < promised:
        raise SampleError(
            f"{name}: ends after {len(packets)} of {promised or 'more'} frames; fetch it again", "truncated"
        )
    return packets


class Track:
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
        """Time of every frame from the first one on, and the clip's duration.

        A last frame without a duration lasts as long as one at `rate`, else as the mean of the others.
        """
        step = 1 / rate if rate else Fraction(0)
        if not self.timed:
            return [round(float(rank * step), 6) for rank in range(self.num_frames + 1)]
        last = next(
            packet for packet in self.packets if packet.pts == self.times[-1] and not packet.is_discard
        )
        offsets = [(time - self.times[0]) * time_base for time in self.times]
        if not step and self.num_frames > 1:
            step = offsets[-1] / (self.num_frames - 1)
        offsets.append(offsets[-1] + (last.duration * time_base if last.duration else step))
        return [round(float(offset), 6) for offset in offsets]
