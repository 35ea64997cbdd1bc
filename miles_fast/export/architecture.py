"""The architecture that a state dict of the published names is of."""

from __future__ import annotations

import re

from torch import Tensor

from miles_fast.config import ModelConfig, TextEncoderConfig, VideoEncoderConfig

_HEAD = 64  # width of an attention head in both published encoders
_NEEDED = (
    "video_model.cls_token",
    "video_model.pos_embed",
    "video_model.temporal_embed",
    "video_model.patch_embed.proj.weight",
    "video_model.blocks.0.mlp.fc1.weight",
    "text_model.embeddings.word_embeddings.weight",
    "text_model.embeddings.position_embeddings.weight",
    "text_model.transformer.layer.0.ffn.lin1.weight",
    "vid_proj.0.weight",
)


def infer_architecture(weights: dict[str, Tensor], tokenizer: str, source: str) -> tuple[ModelConfig, int]:
    """Sizes and the number of word embeddings; heads are 64 wide, as published, for no weight tells them.

    Raises ValueError listing the keys that are missing for it, or a width that 64 does not divide.
    """
    missing = [name for name in _NEEDED if name not in weights]
    if missing:
        others = [name for name in weights if not name.startswith(("video_model.", "text_model."))]
        raise ValueError(
            f"{source}: missing {', '.join(missing)}; it has {len(weights)} tensors, among them "
            f"{', '.join([*others, *weights][:5])}: no checkpoint of MILES or Frozen"
        )
    shape = {name: tuple(weights[name].shape) for name in _NEEDED}
    width, _, patch, _ = shape["video_model.patch_embed.proj.weight"]
    vocabulary_size, text_width = shape["text_model.embeddings.word_embeddings.weight"]
    for tower, size in (("video_model", width), ("text_model", text_width)):
        if size % _HEAD:
            raise ValueError(
                f"{source}: {tower} is {size} wide, no multiple of {_HEAD}: its heads cannot be told; "
                "convert it from a file of this program, which says so"
            )
    grid = round((shape["video_model.pos_embed"][1] - 1) ** 0.5)
    config = ModelConfig(
        video=VideoEncoderConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=_depth(weights, r"video_model\.blocks\.(\d+)\."),
            heads=width // _HEAD,
            mlp_ratio=shape["video_model.blocks.0.mlp.fc1.weight"][0] / width,
            num_frames=shape["video_model.temporal_embed"][1],
        ),
        text=TextEncoderConfig(
            tokenizer=tokenizer,
            width=text_width,
            depth=_depth(weights, r"text_model\.transformer\.layer\.(\d+)\."),
            heads=text_width // _HEAD,
            hidden=shape["text_model.transformer.layer.0.ffn.lin1.weight"][0],
            max_positions=shape["text_model.embeddings.position_embeddings.weight"][0],
        ),
        embedding=shape["vid_proj.0.weight"][0],
    )
    return config, vocabulary_size


def _depth(weights: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for found in map(re.compile(pattern).match, weights) if found)
