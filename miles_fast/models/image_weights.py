"""Weights of an image ViT, from a file or timm, as the video encoder's start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_fast.models.video_encoder import SpaceTimeTransformer


def image_weights(source: str) -> dict[str, Tensor]:
    """State dict of an image ViT: a local .safetensors file, or a timm model name (downloaded by timm).

    Raises ValueError when the source can be neither read nor downloaded.
    """
    if source.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(source)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model.video.weights = {source}: cannot be read ({error})") from error
    from miles_fast.models.torchvision_cpu import repair_torchvision

    repair_torchvision()
    import timm

    if not timm.is_model(source):
        raise ValueError(
            f"model.video.weights = {source!r}: neither a .safetensors file nor a timm model name"
        )
    try:
        return timm.create_model(source, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.video.weights = {source!r}: timm could not get the weights ({error}); "
            "download them elsewhere and name the .safetensors file"
        ) from error


def load_image_weights(encoder: SpaceTimeTransformer, weights: dict[str, Tensor], source: str) -> None:
    """Copy an image ViT into the encoder and start its temporal branch from it.

    Names are timm's. The position embedding is resized bicubically when the grids differ; a LayerScale is
    folded into the layer before it; classifier heads are ignored. Raises ValueError listing what is missing
    or does not fit.
    """
    weights = _fold_layer_scale({name: tensor.float() for name, tensor in weights.items()})
    own = encoder.state_dict()
    if "pos_embed" in weights:
        weights["pos_embed"] = _resize_positions(weights["pos_embed"], encoder.config.grid)
    temporal = ("temporal_embed", ".timeattn.", ".norm3.")
    wanted = [name for name in own if not any(part in name for part in temporal)]
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the encoder's is {tuple(own[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != own[name].shape
    ]
    unknown = [
        name for name in weights if name not in own and not name.startswith(("head", "fc_norm", "pre_logits"))
    ]
    problems += [f"unknown {name}" for name in unknown]
    if problems:
        raise ValueError(f"model.video.weights = {source} does not fit model.video: {_first(problems)}")
    encoder.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    encoder.initialize_temporal_branch()


def _fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = dict(weights)
    for name, gamma in weights.items():
        if name.endswith((".ls1.gamma", ".ls2.gamma")):
            layer = name[: -len("ls1.gamma")] + ("attn.proj" if ".ls1." in name else "mlp.fc2")
            folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * gamma[:, None]
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * gamma
            del folded[name]
    return folded


def _resize_positions(table_1ND: Tensor, grid: int) -> Tensor:
    old = round((table_1ND.shape[1] - 1) ** 0.5)
    if old == grid or old * old != table_1ND.shape[1] - 1:
        return table_1ND
    square = table_1ND[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([table_1ND[:, :1], square.flatten(2).transpose(1, 2)], dim=1)


def _first(lines: Iterable[str], count: int = 8) -> str:
    lines = list(lines)
    more = f" and {len(lines) - count} more" if len(lines) > count else ""
    return "; ".join(lines[:count]) + more
