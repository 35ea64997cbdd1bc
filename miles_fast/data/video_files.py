"""Loose video files as evaluation sees them, decoded in reading processes beside the one that encodes."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from miles_fast.data.clips import BadSample, Clip
from miles_fast.data.reading import Pending, Reader, ReadingPool
from miles_fast.data.sampling import evaluation_view, segment_frames
from miles_fast.data.shards import SampleError
from miles_fast.data.videos import read_frames

AHEAD = 2  # batches being decoded while one is encoded


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video of a set: the name it goes by, and where it lies."""

    key: str
    path: str


def read_video_files(files: Sequence[VideoFile], num_frames: int) -> list[Clip | BadSample]:
    """The middle frames of equal segments and the centre square of each file, or why it cannot be read."""
    return [_read(file, num_frames) for file in files]


def _read(file: VideoFile, num_frames: int) -> Clip | BadSample:
    try:
        return read_video_file(file, num_frames)
    except SampleError as error:
        return BadSample(key=file.key, shard=file.path, cause=error.cause, message=str(error))


def read_video_file(file: VideoFile, num_frames: int) -> Clip:
    """One file as evaluation sees it. Raises SampleError where it cannot be read."""

    def choose(available: int) -> np.ndarray:
        return segment_frames(available, num_frames)

    frames, info = read_frames(file.path, choose, name=file.key)
    width, height = info.square_size
    return Clip(frames=frames, view=evaluation_view(height, width), caption="", key=file.key)


def decode_files(
    files: Sequence[VideoFile], *, num_frames: int, batch: int, num_workers: int
) -> Generator[list[Clip | BadSample], None, None]:
    """Batches of `read_video_files` in order; the frames of one are good until the next is asked for.

    Close it when done.
    """
    coming: deque[list[Pending]] = deque()
    starts = iter(range(0, len(files), batch))
    with contextlib.closing(ReadingPool(Reader(), num_workers)) as pool:
        while True:
            while len(coming) <= AHEAD and (start := next(starts, None)) is not None:
                part = files[start : start + batch]
                share = -(-len(part) // num_workers)
                coming.append(
                    [
                        pool.call(read_video_files, part[at : at + share], num_frames)
                        for at in range(0, len(part), share)
                    ]
                )
            if not coming:
                return
            pending = coming.popleft()
            yield [clip for one in pending for clip in one.collect()[0]]
            for one in pending:
                one.release()
