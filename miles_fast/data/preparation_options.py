"""What a preparation is asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal


class PreparationError(ValueError):
    """Preparation cannot go on; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class PreparationOptions:
    """Frames kept of each clip, their short side in pixels (never enlarged), JPEG quality, clips a shard.

    With `fps`, one frame for every 1 / fps s of the clip, at most `max_frames`, instead of `frames`. Layout
    `remux` and `transcode` write videos instead: the same packets without cropping, or H.264 of `short_side`,
    `fps` (the clip's own times without) and a key frame every `gop` frames.
    """

    layout: Literal["frames", "remux", "transcode"] = "frames"
    frames: int = 8
    fps: float | None = None
    max_frames: int = 32
    short_side: int = 256
    quality: int = 90
    gop: int = 8
    samples_per_shard: int = 512
    workers: int | None = None
    limit: int | None = None
    allow_hdr: bool = False

    def __post_init__(self):
        for name in ("frames", "max_frames", "short_side", "samples_per_shard", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PreparationError(f"{name} is {value}; it must be at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise PreparationError(f"fps is {self.fps}; it must be a number above 0")
        if self.layout not in ("frames", "remux", "transcode"):
            raise PreparationError(f"layout is {self.layout!r}; it must be frames, remux or transcode")
        if self.gop < 2:
            raise PreparationError(
                f"gop is {self.gop}; NVDEC fails on key frames alone: at least 2, 8 is fast"
            )
        if self.layout == "remux" and (self.fps is not None or self.allow_hdr):
            raise PreparationError("remux keeps the frames as they are: leave out fps and allow_hdr")
        if not 1 <= self.quality <= 100:
            raise PreparationError(f"quality is {self.quality}; JPEG quality goes from 1 to 100")

    def planned(self) -> dict:
        """The options that decide what is written; the number of workers does not."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}
