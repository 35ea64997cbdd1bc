"""A page to look at before GPU time is spent: some samples of shards with their frames and captions."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from miles_fast.data.frame_headers import frame_size
from miles_fast.data.sampling import segment_frames, timed_frames
from miles_fast.data.shards import Sample, SampleError, ShardSet
from miles_fast.data.videos import ByTime, read_frames
from miles_fast.files import write_whole

_MAX_FRAMES = 8  # of one sample, from all of its length
_THUMBNAIL = (240, 96)  # pixels at most, width by height
_STYLE = (
    "body{font:14px sans-serif;margin:2em}"
    "article{margin:0 0 1.5em;border-top:1px solid #ccc;padding-top:.5em}"
    "figure{display:inline-block;margin:0 4px 0 0;font-size:11px;color:#666}img{display:block}"
    "p{margin:.3em 0}.about{color:#666;font-size:12px}.bad{color:#b00}"
)


def write_sample_page(
    shards: Sequence[Path], page: Path, *, seed: str, about: str, num_samples: int = 40
) -> None:
    """Write one html file, without links to others, of samples drawn at random by `seed`, in shard order.

    `about` stands at the top. A sample that cannot be read is shown with the reason. Raises ShardError.
    """
    opened = ShardSet(shards)
    drawn = sorted(random.Random(seed).sample(range(len(opened)), min(num_samples, len(opened))))
    articles = "\n".join(_article(opened[number]) for number in drawn)
    text = f"{len(drawn)} of {len(opened)} samples, drawn at random. {about}"
    write_whole(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>samples</title>'
        f"<style>{_STYLE}</style><p>{_safe(text)}</p>\n{articles}\n</html>\n",
    )


def _safe(text: object) -> str:
    return html.escape(str(text))


def _article(sample: Sample) -> str:
    try:
        record = sample.record()
        pictures, times, size = _pictures(sample, record)
        captions = sample.captions(every=True, record=record)
    except SampleError as error:
        return f'<article><p class="bad">{_safe(error)}</p></article>'
    figures = "".join(
        f"<figure>{_thumbnail(picture)}{_safe(time)}</figure>"
        for picture, time in zip(pictures, times, strict=True)
    )
    more = f" (and {len(captions) - 1} more captions)" if len(captions) > 1 else ""
    source = record.get("source")
    said = ", ".join(f"{name} {value}" for name, value in source.items()) if isinstance(source, dict) else ""
    return (
        f"<article>{figures}<p>{_safe(captions[0])}{more}</p>"
        f'<p class="about">{_safe(f"{sample.shard.name}: {sample.key}, {size}")}. {_safe(said)}</p></article>'
    )


def _pictures(sample: Sample, record: dict) -> tuple[list[Image.Image], list[str], str]:
    """Some of the frames, what stands under each, and the sample's size in words."""
    if sample.layout() == "video":
        data = sample.read(sample.video_extension())
        choice = ByTime(lambda seconds: timed_frames(seconds, _MAX_FRAMES))
        arrays, info = read_frames(data, choice, name=str(sample), crop=sample.crop(record))
        times = [f"{seconds:.2f} s" for seconds in info.timestamps_seconds]
        shown = [Image.fromarray(array).resize(info.square_size) for array in arrays]
        size = f"{info.num_frames} frames, {info.width}x{info.height}, {len(data)} bytes"
        return shown, times, size
    extensions = sample.frame_extensions()
    chosen = segment_frames(len(extensions), min(_MAX_FRAMES, len(extensions))).tolist()
    stamps = record.get("timestamps_seconds")
    if not (isinstance(stamps, list) and len(stamps) == len(extensions)):
        stamps = [None] * len(extensions)
    frames, sizes = [], []
    for number in chosen:
        sizes.append(len(sample.read(extensions[number])))
        frames.append(_open(sample, extensions[number]))
    times = [extensions[n] if stamps[n] is None else f"{stamps[n]:.2f} s" for n in chosen]
    mean = int(np.mean(sizes))
    size = f"{len(extensions)} frames, {frames[0].width}x{frames[0].height}, {mean} bytes each"
    return frames, times, size


def _open(sample: Sample, extension: str) -> Image.Image:
    data = sample.read(extension)
    frame_size(data, f"{sample}.{extension}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"{sample}.{extension}: does not decode ({error})", "not decodable") from error


def _thumbnail(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=70)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{picture.width}" height="{picture.height}" src="data:image/jpeg;base64,{data}">'
