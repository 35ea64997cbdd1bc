"""Models on disk: a folder with model.safetensors (published names), model.json and tokenizer/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles_fast.config import ModelConfig
from miles_fast.config_tree import parse_model, to_dict
from miles_fast.files import whole_folder
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.models.text_encoder import load_tokenizer

FORMAT = "miles_fast/1"
PRETRAINING = "pretraining."  # prefix of what only pre-training needs: mask token and regression head


def write_model(
    folder: Path, weights: dict[str, Tensor], config: ModelConfig, vocabulary_size: int, tokenizer: str | Any
) -> None:
    """Write a model folder aside and rename it into place; an existing one of that name is replaced.

    `tokenizer` is a name or folder, or one that is loaded. Raises ValueError when the existing folder holds
    other files.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    with whole_folder(folder, spare_others=True) as partial:
        state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        description = {"format": FORMAT, "model": to_dict(config), "vocabulary_size": vocabulary_size}
        description["model"]["text"]["tokenizer"] = "tokenizer"
        (partial / "model.json").write_text(json.dumps(description, indent=2) + "\n")
        tokenizer.save_pretrained(partial / "tokenizer")


def read_description(folder: Path) -> tuple[ModelConfig, int]:
    """Architecture and vocabulary size of a model folder. Raises ValueError naming file and remedy."""
    path = folder / "model.json"
    try:
        description = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name a folder written by launch/export.py or a run"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path}: format is not {FORMAT!r}; export the model again with this version")
    config = parse_model(description["model"], f"{path} (model)")
    return config, int(description["vocabulary_size"])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Float32 weights of a model folder, pre-training ones included. Raises ValueError naming the file."""
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def load_weights(model: DualEncoder, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a model, strictly. Raises ValueError as `check_weights` does."""
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PRETRAINING)}
    check_weights(model, weights, source)
    model.load_state_dict(weights)


def check_weights(model: DualEncoder, weights: dict[str, Tensor], source: str) -> None:
    """Raise ValueError listing missing, unknown and misshapen keys, when there are any."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{source} is of another architecture: {'; '.join(problems[:8])}{more}")
