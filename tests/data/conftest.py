"""Clips, images and tars made on the spot, and the real clips where they lie beside the checkout."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


def _encode_video(
    levels: Sequence[int],
    *,
    codec: str = "libx264",
    container: str = "mp4",
    size: tuple[int, int] = (64, 48),
    times: Sequence[int] | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video whose frame i is grey of level `levels[i]`, shown at `times[i]` / 30 s."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.gop_size = gop
        stream.time_base = stream.codec_context.time_base = Fraction(1, 30)
        for number, level in enumerate(levels):
            picture = np.full((size[1], size[0], 3), level, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def encode_video() -> Callable[..., bytes]:
    return _encode_video


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    return _write_tar


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of the real clips; tests that need it skip where it is absent."""
    return _shared("clips", "manifest.json")


@pytest.fixture(scope="session")
def real_captions() -> Path:
    """Folder of the data sets' own caption files; tests that need it skip where it is absent."""
    return _shared("captions", "webvid_sample_20.csv")


def _shared(name: str, mark: str) -> Path:
    shared = os.environ.get("MILES_FAST_SHARED") or Path(__file__).resolve().parents[2].parent / "shared"
    folder = Path(shared) / name
    if not (folder / mark).is_file():
        pytest.skip(f"the real {name} are not at {folder} (MILES_FAST_SHARED names another place)")
    return folder
