"""From a run or a checkpoint to a model folder for downstream use."""

from __future__ import annotations

from pathlib import Path

from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.models.storage import PRETRAINING, read_description, read_model, read_weights, write_model
from miles_fast.training.checkpoint import model_folder


def load(path: str | Path, device: str = "cpu") -> DualEncoder:
    """The model of an exported folder, a run or a checkpoint."""
    return read_model(model_folder(path), device)


def export_run(source: str | Path, output: str | Path) -> Path:
    """Write the student of a run or checkpoint (any ZeRO stage) as a model folder, in float32.

    Mask token and regression head stay behind. Raises ValueError or OSError, leaving nothing half-written.
    """
    folder, output = model_folder(source), Path(output)
    config, vocabulary_size = read_description(folder)
    weights = {name: t for name, t in read_weights(folder).items() if not name.startswith(PRETRAINING)}
    write_model(output, weights, config, vocabulary_size, str(folder / "tokenizer"))
    return output
