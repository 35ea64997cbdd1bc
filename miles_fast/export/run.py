"""From weights of any kind to a model for use, or to a file or folder of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save_file

from miles_fast.config_tree import to_dict
from miles_fast.export.checkpoint_file import write_checkpoint_file
from miles_fast.export.encoder import VideoTextEncoder
from miles_fast.export.graphs import write_onnx, write_programs
from miles_fast.export.pretrained import Pretrained, build_model, is_image_tower, read_pretrained
from miles_fast.files import whole_file
from miles_fast.models.storage import FORMAT, write_model
from miles_fast.models.text_encoder import load_tokenizer

Target = Literal["safetensors", "official", "frozen", "hf", "timm", "onnx", "pt2"]
# What tells a folder that a target wrote: a file of JSON, and whether it says so.
_MARKS: dict[Target, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "safetensors": ("model.json", lambda found: found.get("format") == FORMAT),
    "hf": ("config.json", lambda found: found.get("model_type") == "miles"),
    "onnx": ("inputs.json", lambda found: "video_encoder.onnx" in found),
    "pt2": ("inputs.json", lambda found: "video_encoder.pt2" in found),
}


def load(path: str | Path, device: str = "cpu", **options: Any) -> VideoTextEncoder:
    """The model of an export, a Hugging Face folder, a run or a checkpoint; more in `read_pretrained`."""
    return build_model(read_pretrained(path, **options), VideoTextEncoder).to(device)


def export_run(source: str | Path, output: str | Path) -> Path:
    """Write the student of a run or checkpoint (any ZeRO stage) as a model folder, in float32.

    Mask token and regression head stay behind. Raises ValueError or OSError, leaving nothing half-written.
    """
    return write_pretrained(read_pretrained(source), "safetensors", output)[0]


def write_pretrained(found: Pretrained, target: Target, output: str | Path) -> tuple[Path, str]:
    """Write weights as one kind; returns what was written, and what is to be said about it.

    `safetensors`: a model folder of ours. `hf`: a Hugging Face folder with processor and model card.
    `official`, `frozen`: a .pth. `timm`: a .safetensors of the image tower alone. `onnx`, `pt2`: a folder
    with both encoders as ONNX, or as torch.export programs. An existing folder is replaced when the same
    target wrote it and it holds nothing else; a symbolic link stays one, what it names is written. Raises
    ValueError or OSError, leaving nothing half-written.
    """
    if target not in get_args(Target):
        raise ValueError(f"--to {target}: expected one of {', '.join(get_args(Target))}")
    output, config = Path(output), found.config
    if output.is_symlink():
        output = output.resolve()
    suffix = {"official": ".pth", "frozen": ".pth", "timm": ".safetensors"}.get(target, "")
    if suffix and output.suffix != suffix:
        raise ValueError(f"--output {output}: --to {target} writes one file; name it *{suffix}")
    if not suffix and output.is_file():
        raise ValueError(f"--output {output} is a file; --to {target} writes a folder")
    if not suffix:
        _check_replaceable(output, target)
    output.parent.mkdir(parents=True, exist_ok=True)
    if target == "safetensors":
        write_model(output, found.weights, config, found.vocabulary_size, found.tokenizer)
        return output, "model.safetensors under the published names, model.json, tokenizer/"
    if target in ("official", "frozen"):
        description = {
            "model": to_dict(config),
            "vocabulary_size": found.vocabulary_size,
            "tokenizer_size": len(load_tokenizer(found.tokenizer)),
        }
        write_checkpoint_file(output, found.weights, target, description)
        return output, "the tokenizer does not fit into it: give it with --tokenizer when you read it back"
    if target == "timm":
        tower = {
            name.removeprefix("video_model."): tensor.contiguous()
            for name, tensor in found.weights.items()
            if is_image_tower(name)
        }
        what = "image tower only: temporal branch, text encoder and projections do not fit timm's ViT"
        with whole_file(output) as partial:
            save_file(tower, partial, metadata={"format": "pt", "content": f"MILES, {what}"})
        return output, what
    if target == "hf":
        from miles_fast.export.hugging_face import write_hugging_face

        write_hugging_face(found, output)
        return output, "for MilesModel and MilesProcessor of miles_fast.export.hugging_face"
    write = write_onnx if target == "onnx" else write_programs
    write(found, output)
    frames = config.video.num_frames
    return output, f"both encoders for any batch, clips of {frames} frames (--frames for others)"


def _check_replaceable(folder: Path, target: Target) -> None:
    """Raise ValueError unless it is not there, empty, or one that the target wrote.

    What else such a folder holds shows when the new one is written (`whole_folder`).
    """
    entries = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    mark, is_ours = _MARKS[target]
    if entries and not is_ours(_read_mark(folder / mark)):
        name = mark if mark in entries else entries[0]
        raise ValueError(
            f"--output {folder} holds {name}, which --to {target} did not write and which would be lost; "
            "name a new folder"
        )


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
