"""A decoded frame to the pixels that people see: RGB, upright, on white, in an ordinary screen's range."""

from __future__ import annotations

import numpy as np

from miles_fast.data.tone_map import HDR_TRANSFERS, tone_mapped


def upright_rgb(frame, reformatter, name: str, crop: tuple[int, int] | None = None) -> np.ndarray:
    """RGB pixels of one frame, HDR mapped, transparency on white, turned upright.

    `crop` (width, height) is what is shown of the frame as it is stored, from its upper left corner.
    """
    turns = quarter_turns(frame.rotation)
    if frame.color_trc in HDR_TRANSFERS:
        frame = tone_mapped(frame, name)
    if any(component.is_alpha for component in frame.format.components):
        pixels = reformatter.reformat(frame, format="rgba", threads=1).to_ndarray().astype(np.uint16)
        alpha = pixels[..., 3:]
        picture = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if crop is not None:
        picture = picture[: crop[1], : crop[0]]
    return np.ascontiguousarray(np.rot90(picture, turns))  # FFmpeg pads odd rows


def quarter_turns(rotation: int) -> int:
    """Quarter turns to the left that set a picture upright."""
    return round(rotation / 90) % 4
