"""MILES pre-training: shards in, retrieval numbers and weights out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_fast.export.encoder import VideoTextEncoder

__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu", **options: Any) -> VideoTextEncoder:
    """A trained model, with `encode_video`, `encode_patches` and `encode_text`.

    `path`: an export, a Hugging Face folder, a run or a checkpoint. Other weights by kind="official" (frozen,
    timm) with what `miles_fast.export.pretrained.read_pretrained` takes.
    """
    from miles_fast.export.run import load as load_model

    return load_model(path, device, **options)
