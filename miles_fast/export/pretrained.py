"""Weights of any format, under the published names and checked: where conversion and fine-tuning start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from miles_fast.config import ModelConfig
from miles_fast.config_tree import parse_model
from miles_fast.export.architecture import infer_architecture
from miles_fast.export.checkpoint_file import Lineage, read_checkpoint_file
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.models.image_weights import image_weights, load_image_weights
from miles_fast.models.storage import PRETRAINING, check_weights, read_description, read_weights
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.models.video_encoder import temporal_rows
from miles_fast.training.checkpoint import model_folder

Model = TypeVar("Model", bound=DualEncoder)
Kind = Literal["auto", "safetensors", "official", "frozen", "hf", "timm"]
PUBLISHED_TOKENIZER = "distilbert-base-uncased"
TEMPORAL = "video_model.temporal_embed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Float32 weights under the published names with all that a model needs beside them.

    `tokenizer` is a folder or a name; `run` the training run that they come from, where it is at hand, and
    `step` the checkpoint's; `notes` say what a conversion filled in or changed.
    """

    weights: dict[str, Tensor]
    config: ModelConfig
    vocabulary_size: int
    tokenizer: str
    run: Path | None = None
    step: int | None = None
    notes: tuple[str, ...] = ()


def read_pretrained(
    path: str | Path,
    kind: Kind = "auto",
    *,
    tokenizer: str | None = None,
    base: str | Path | None = None,
    drop: Sequence[str] = (),
) -> Pretrained:
    """Read weights of one kind; every key is accounted for: none missing, and none unknown but those to drop.

    `safetensors`: a model folder of ours, a run, or a checkpoint of one (any ZeRO stage). `hf`: a folder that
    MilesModel.save_pretrained wrote. `official`, `frozen`: a .pth, which holds no tokenizer: `tokenizer`
    names it (distilbert-base-uncased otherwise). `timm`: an image ViT (a .safetensors file or a model's name)
    put into `base`, a model that `auto` can read, whose other weights stay. `auto` tells all but timm apart.
    `drop`: prefixes of keys to leave out. Raises ValueError naming the file, the keys and the remedy.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"--from {kind}: expected one of {', '.join(get_args(Kind))}")
    if kind == "timm":
        return _with_image_tower(str(path), base)
    if base is not None:
        raise ValueError(f"--base is for an image tower (--from timm) only, not for --from {kind}")
    if kind in ("official", "frozen"):
        found = _from_checkpoint_file(Path(path), kind, tokenizer)
    elif kind == "auto" and Path(path).name == "model.safetensors" and _is_model(Path(path).parent):
        raise ValueError(f"{path} is the weights of a model alone: name its folder, {Path(path).parent}")
    elif kind == "auto" and Path(path).suffix == ".safetensors":
        raise ValueError(f"{path} is an image tower alone: put it into a model with --from timm --base MODEL")
    elif kind == "auto" and Path(path).is_file():
        found = _from_checkpoint_file(Path(path), None, tokenizer)
    elif kind == "hf" or (kind == "auto" and is_foreign(path)):
        found = _from_hugging_face(Path(path), tokenizer)
    else:
        found = _from_folder(model_folder(path), tokenizer)
    if drop:
        kept = {name: tensor for name, tensor in found.weights.items() if not name.startswith(tuple(drop))}
        found = dataclasses.replace(found, weights=kept)
    _check_vocabulary(found, str(path))
    with torch.device("meta"):
        model = DualEncoder(architecture_of(found), found.vocabulary_size)
    check_weights(model, found.weights, str(path))
    return found


def build_model(found: Pretrained, make: type[Model] = DualEncoder) -> Model:
    """A model with these weights and its tokenizer, in evaluation mode; `make` is its class."""
    model = make(architecture_of(found), found.vocabulary_size)
    model.load_state_dict(found.weights)
    model.tokenizer = load_tokenizer(found.tokenizer)
    return model.eval()


def with_frames(found: Pretrained, num_frames: int) -> Pretrained:
    """The same for clips of `num_frames`: the encoder's own rule, written into its temporal embedding.

    Fewer frames than the table has rows keep the first ones; more are interpolated linearly over time (what
    third parties do with the published weights; Frozen pads with zeros instead: spec/miles.md 7.2). Raises
    ValueError for less than 1.
    """
    if num_frames < 1:
        raise ValueError(f"--frames {num_frames}: must be at least 1")
    rows = found.config.video.num_frames
    if num_frames == rows:
        return found
    how = "its first rows" if num_frames < rows else "interpolated linearly"
    video = dataclasses.replace(found.config.video, num_frames=num_frames)
    table = temporal_rows(found.weights[TEMPORAL][0], num_frames)
    return dataclasses.replace(
        found,
        weights={**found.weights, TEMPORAL: table[None].contiguous()},
        config=dataclasses.replace(found.config, video=video),
        notes=(*found.notes, f"temporal_embed: {rows} -> {num_frames} frames, {how}"),
    )


def _check_vocabulary(found: Pretrained, source: str) -> None:
    """Refuse a tokenizer of another vocabulary. Raises ValueError with both sizes."""
    size = len(load_tokenizer(found.tokenizer))
    if size > found.vocabulary_size:
        raise ValueError(
            f"{source}: text_model.embeddings.word_embeddings.weight has {found.vocabulary_size} rows, but "
            f"the tokenizer {found.tokenizer!r} has {size} tokens; name its own with --tokenizer"
        )


def _from_folder(folder: Path, tokenizer: str | None) -> Pretrained:
    config, vocabulary_size = read_description(folder)
    weights = {name: t for name, t in read_weights(folder).items() if not name.startswith(PRETRAINING)}
    checkpoint, run, step = folder.parent, None, None
    if (checkpoint / "state.json").is_file():
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        run = checkpoint.parents[1] if (checkpoint.parents[1] / "log.jsonl").is_file() else None
    return Pretrained(
        weights=weights,
        config=config,
        vocabulary_size=vocabulary_size,
        tokenizer=tokenizer or str(folder / "tokenizer"),
        run=run,
        step=step,
    )


def _from_checkpoint_file(path: Path, lineage: Lineage | None, tokenizer: str | None) -> Pretrained:
    weights, description = read_checkpoint_file(path, lineage)
    tokenizer = tokenizer or PUBLISHED_TOKENIZER
    if description:
        config = parse_model(description["model"], f"{path} (miles_fast.model)")
        vocabulary_size = int(description["vocabulary_size"])
    else:
        config, vocabulary_size = infer_architecture(weights, tokenizer, str(path))
    size, wanted = len(load_tokenizer(tokenizer)), description.get("tokenizer_size", vocabulary_size)
    if size != wanted:
        raise ValueError(
            f"{path} holds no tokenizer and was trained with one of {wanted} tokens, but {tokenizer!r} has "
            f"{size}; name its own with --tokenizer"
        )
    return Pretrained(weights=weights, config=config, vocabulary_size=vocabulary_size, tokenizer=tokenizer)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.json", "config.json"))


def is_foreign(path: str | Path) -> bool:
    """Whether it is a file or a Hugging Face folder, which a run cannot start from as it is."""
    path = Path(path)
    return path.is_file() or ((path / "config.json").is_file() and (path / "model.safetensors").is_file())


def _from_hugging_face(folder: Path, tokenizer: str | None) -> Pretrained:
    # Registers the type that config.json names, or transformers warns of it.
    import miles_fast.export.hugging_face  # noqa: F401

    place = folder / "config.json"
    try:
        description = json.loads(place.read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a folder that MilesModel.save_pretrained wrote ({error})") from error
    if description.get("model_type") != "miles":
        raise ValueError(f"{place}: model_type is {description.get('model_type')!r}, not 'miles'")
    tree: dict[str, Any] = {key: description.get(key) for key in ("video", "text", "embedding", "attention")}
    config = parse_model(tree, str(place))
    return Pretrained(
        weights={name: tensor.float() for name, tensor in weights.items()},
        config=config,
        vocabulary_size=int(description["vocabulary_size"]),
        tokenizer=tokenizer or str(folder),
    )


def _with_image_tower(source: str, base: str | Path | None) -> Pretrained:
    if base is None:
        raise ValueError(
            f"{source}: an image tower has neither text encoder nor temporal branch; name the model to "
            "put it into with --base"
        )
    found = read_pretrained(base)
    model = build_model(found)
    load_image_weights(model.video_model, image_weights(source), source)
    tower = {name: t for name, t in model.state_dict().items() if is_image_tower(name)}
    return dataclasses.replace(
        found,
        weights={**found.weights, **tower},
        run=None,
        step=None,
        notes=(*found.notes, f"image tower of {source}; temporal branch, text and projections of {base}"),
    )


def is_image_tower(name: str) -> bool:
    """Whether a weight is among those that an image ViT has too."""
    temporal = (".temporal_embed", ".timeattn.", ".norm3.")
    return name.startswith("video_model.") and not any(part in name for part in temporal)


def architecture_of(found: Pretrained) -> ModelConfig:
    """The sizes alone: nothing is to be fetched by name where all weights are at hand."""
    text = dataclasses.replace(found.config.text, tokenizer=found.tokenizer, weights=None)
    return dataclasses.replace(
        found.config, text=text, video=dataclasses.replace(found.config.video, weights=None)
    )
