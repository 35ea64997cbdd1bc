"""One sample to what the augmentation takes: checked frames, view, caption; bad samples substituted."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import dataclass

import numpy as np

from miles_fast.data.augmentation import Frames
from miles_fast.data.order import Draw, substitute
from miles_fast.data.sampling import View, evaluation_view, sample_stream, segment_frames, training_view
from miles_fast.data.shards import SampleError, ShardError, ShardSet
from miles_fast.data.videos import read_frames

MAX_SUBSTITUTES = 100


@dataclass(frozen=True, kw_only=True)
class ClipDraw:
    """What is drawn of each clip; `crop_scale` and `flip` are for training."""

    num_frames: int
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A sample as drawn: T frames (JPEG bytes, or (H, W, 3) uint8), their view, one caption, its key."""

    frames: Frames
    view: View
    caption: str
    key: str


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be used: where it is, the cause it is counted under, and the message."""

    key: str
    shard: str
    cause: str
    message: str


def read_clip(shards: ShardSet, sample: int, draw: ClipDraw, stream: np.random.Generator | None) -> Clip:
    """Read one sample; with a stream frames, crop, flip and caption are drawn from it (training), without one
    middle frames, the centre square and the first caption are taken (evaluation).

    Raises SampleError when the sample cannot be used; its bytes never reach DALI then.
    """
    captions = shards.captions(sample, every=stream is not None)
    caption = captions[0] if stream is None else captions[int(stream.integers(len(captions)))]
    if shards.layout(sample) == "video":
        data = shards.read(sample, shards.video_extension(sample))
        name = shards.describe(sample)
        frames, info = read_frames(
            data, lambda count: segment_frames(count, draw.num_frames, stream), name=name
        )
        height, width = info.height, info.width
    else:
        frames, height, width = _read_images(shards, sample, draw.num_frames, stream)
    if stream is None:
        view = evaluation_view(height, width)
    else:
        view = training_view(stream, height, width, draw.crop_scale, draw.flip)
    return Clip(frames=frames, view=view, caption=caption, key=shards.key(sample))


def read_or_substitute(
    shards: ShardSet, draw: Draw, clip: ClipDraw, seed: int
) -> tuple[Clip, list[BadSample]]:
    """The drawn sample, or the first readable substitute, with the bad ones met on the way.

    Raises ShardError after 100 bad samples in a row.
    """
    bad: list[BadSample] = []
    for attempt in range(MAX_SUBSTITUTES):
        sample = substitute(len(shards), draw, seed, attempt) if attempt else draw.sample
        stream = sample_stream(seed, draw.epoch, draw.position, attempt)
        try:
            return read_clip(shards, sample, clip, stream), bad
        except SampleError as error:
            bad.append(bad_sample(shards, sample, error))
    raise ShardError(
        f"{MAX_SUBSTITUTES} unusable samples in a row, the last: {bad[-1].message}; "
        f"check {bad[-1].shard} and its neighbours, or prepare them again with launch/prepare.py"
    )


def bad_sample(shards: ShardSet, sample: int, error: SampleError) -> BadSample:
    """The record of an unusable sample."""
    return BadSample(
        key=shards.key(sample), shard=str(shards.shard(sample)), cause=error.cause, message=str(error)
    )


def _read_images(
    shards: ShardSet, sample: int, num_frames: int, stream: np.random.Generator | None
) -> tuple[list[bytes], int, int]:
    extensions = shards.frame_extensions(sample)
    chosen = segment_frames(len(extensions), num_frames, stream)
    record = _record(shards, sample)
    checksums = record.get("crc32")
    if not (isinstance(checksums, list) and len(checksums) == len(extensions)):
        checksums = None
    data = {}
    for number in dict.fromkeys(chosen.tolist()):
        data[number] = shards.read(sample, extensions[number])
        name = f"{shards.describe(sample)}.{extensions[number]}"
        if checksums is not None:
            if zlib.crc32(data[number]) != checksums[number]:
                raise SampleError(f"{name}: bytes differ from the checksum in KEY.json", "wrong checksum")
        else:
            _check_complete(data[number], name)
    width, height = record.get("width"), record.get("height")
    if checksums is None or not isinstance(width, int) or not isinstance(height, int):
        width, height = _image_size(data[int(chosen[0])], shards.describe(sample))
    return [data[number] for number in chosen.tolist()], height, width


def _record(shards: ShardSet, sample: int) -> dict:
    if "json" not in shards.extensions(sample):
        return {}
    try:
        record = json.loads(shards.read(sample, "json"))
    except ValueError as error:
        raise SampleError(
            f"{shards.describe(sample)}: KEY.json is not JSON ({error})", "json not readable"
        ) from error
    return record if isinstance(record, dict) else {}


def _check_complete(data: bytes, name: str) -> None:
    """Refuse what DALI would decode to a damaged picture, or die of: not an image, or cut off."""
    if data[:2] == b"\xff\xd8":
        if b"\xff\xd9" not in data[-64:]:
            raise SampleError(f"{name}: JPEG ends before its end marker", "truncated")
    else:
        _image_size(data, name, verify=True)


def _image_size(data: bytes, name: str, verify: bool = False) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if verify:
                image.verify()
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"{name}: not a readable image ({error})", "not decodable") from error
