"""One sample to what the augmentation takes: checked frames, view, caption; bad samples substituted."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from miles_fast.data.frame_headers import check_complete, frame_size
from miles_fast.data.order import Draw, substitute
from miles_fast.data.sampling import View, evaluation_view, sample_stream, segment_frames, training_view
from miles_fast.data.shards import Sample, SampleError, ShardError, ShardSet
from miles_fast.data.videos import EncodedVideo, locate_frames, read_frames

MAX_SUBSTITUTES = 100


# T frames: JPEG bytes (1-D uint8 each) or pixels ((H, W, 3) uint8); or the video that still holds them.
Frames = Sequence[np.ndarray] | EncodedVideo
Input = Literal["jpeg", "pixels", "video"]


@dataclass(frozen=True, kw_only=True)
class ClipDraw:
    """What is drawn of each clip, and what its frames come as; `crop_scale` and `flip` are for training.

    `takes`: jpeg, of frames and images; pixels, of videos; video, which leaves a video encoded where NVDEC
    decodes what PyAV would.
    """

    num_frames: int
    takes: Input
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A sample as drawn: its frames, their view, one caption, its key.

    `tokens` are the caption's ids and attention mask, (2, L) int64, where a Reader has read the clip.
    """

    frames: Frames
    view: View
    caption: str
    key: str
    tokens: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be used: where it is, the cause it is counted under, and the message."""

    key: str
    shard: str
    cause: str
    message: str


def read_clip(shards: ShardSet, number: int, draw: ClipDraw, stream: np.random.Generator | None) -> Clip:
    """Read one sample; with a stream frames, crop, flip and caption are drawn from it (training), without one
    middle frames, the centre square and the first caption are taken (evaluation).

    Raises SampleError when the sample cannot be used; its bytes never reach DALI then.
    """
    sample = shards[number]
    video = sample.layout() == "video"
    if video == (draw.takes == "jpeg"):
        raise SampleError(
            f"{sample}: its layout is {sample.layout()}, unlike the first of its source; name videos and "
            "frames as two sources",
            "other layout",
        )
    record = sample.record()
    captions = sample.captions(every=stream is not None, record=record)
    caption = captions[0] if stream is None else captions[int(stream.integers(len(captions)))]
    if video:
        frames, height, width = _read_video(sample, record, draw, stream)
    else:
        frames, height, width = _read_images(sample, record, draw.num_frames, stream)
    if stream is None:
        view = evaluation_view(height, width)
    else:
        view = training_view(stream, height, width, draw.crop_scale, draw.flip)
    if isinstance(frames, EncodedVideo):
        view = view.within(frames.shown_yx)
    return Clip(frames=frames, view=view, caption=caption, key=sample.key)


def read_or_substitute(
    shards: ShardSet, draw: Draw, clip: ClipDraw, seed: int
) -> tuple[Clip, list[BadSample]]:
    """The drawn sample, or the first readable substitute, with the bad ones met on the way.

    Raises ShardError after 100 bad samples in a row.
    """
    bad: list[BadSample] = []
    for attempt in range(MAX_SUBSTITUTES):
        number = substitute(len(shards), draw, seed, attempt) if attempt else draw.sample
        stream = sample_stream(seed, draw.epoch, draw.position, attempt)
        try:
            return read_clip(shards, number, clip, stream), bad
        except SampleError as error:
            bad.append(bad_sample(shards[number], error))
    raise ShardError(
        f"{MAX_SUBSTITUTES} unusable samples in a row, the last: {bad[-1].message}; "
        f"check {bad[-1].shard} and its neighbours, or prepare them again with launch/prepare.py"
    )


def read_for_evaluation(shards: ShardSet, number: int, draw: ClipDraw) -> Clip | BadSample:
    """The sample as evaluation sees it, or why it cannot be read."""
    try:
        return read_clip(shards, number, draw, None)
    except SampleError as error:
        return bad_sample(shards[number], error)


def bad_sample(sample: Sample, error: SampleError) -> BadSample:
    """The record of an unusable sample."""
    return BadSample(key=sample.key, shard=str(sample.shard), cause=error.cause, message=str(error))


def _read_video(
    sample: Sample, record: dict, draw: ClipDraw, stream: np.random.Generator | None
) -> tuple[Frames, int, int]:
    data = sample.read(sample.video_extension())
    checksum, crop = record.get("video_crc32"), sample.crop(record)
    if checksum is not None and zlib.crc32(data) != checksum:
        raise SampleError(f"{sample}: its video differs from the checksum in KEY.json", "wrong checksum")
    chosen: dict[int, np.ndarray] = {}

    def choose(available: int) -> np.ndarray:
        # Asked twice where the hardware cannot take the video: the frames must be the same ones.
        if available not in chosen:
            chosen[available] = segment_frames(available, draw.num_frames, stream)
        return chosen[available]

    if draw.takes == "video":
        video = locate_frames(data, choose, name=str(sample), crop=crop)
        if video is not None:
            return video, video.height, video.width
    frames, info = read_frames(data, choose, name=str(sample), crop=crop)
    return frames, info.square_size[1], info.square_size[0]


def _read_images(
    sample: Sample, record: dict, num_frames: int, stream: np.random.Generator | None
) -> tuple[list[np.ndarray], int, int]:
    extensions = sample.frame_extensions()
    chosen = segment_frames(len(extensions), num_frames, stream).tolist()
    checksums = record.get("crc32")
    if not (isinstance(checksums, list) and len(checksums) == len(extensions)):
        checksums = None
    data, sizes = {}, []
    for number in dict.fromkeys(chosen):
        name = f"{sample}.{extensions[number]}"
        data[number] = sample.read(extensions[number])
        if checksums is None:
            check_complete(data[number], name)
        elif zlib.crc32(data[number]) != checksums[number]:
            raise SampleError(f"{name}: bytes differ from the checksum in KEY.json", "wrong checksum")
        sizes.append(frame_size(data[number], name))
    width, height = sizes[0]
    return [np.frombuffer(data[number], np.uint8) for number in chosen], height, width
