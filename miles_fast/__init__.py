"""MILES pre-training: shards in, retrieval numbers and weights out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles_fast.models.dual_encoder import DualEncoder

__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu") -> DualEncoder:
    """A trained model, with `encode_video` and `encode_text`: from an export, a run or a checkpoint."""
    from miles_fast.export.run import load as load_model

    return load_model(path, device)
