"""`run.precision: fp8`: which linear layers multiply in fp8, and on what."""

from __future__ import annotations

import torch
from torch import nn

from miles_fast.distributed import note_once
from miles_fast.models.video_encoder import Block

_CAPABILITY = (8, 9)  # Ada, Hopper and later


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Have qkv, fc1 and fc2 of every video block in `model` multiply in fp8 in their forward passes.

    Not `proj`: an attention op writes its input, so that the cast is a pass of its own, which takes what the
    product saves. Without a GPU the same rounded numbers are multiplied in float32. Raises ValueError when
    the GPU does not multiply fp8.
    """
    if device.type != "cuda":
        note_once("run.precision = fp8: without a GPU the rounded numbers are multiplied in float32")
    elif torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise ValueError(
            f"run.precision = fp8 needs a GPU that multiplies fp8 (H100, H200, L40S), and this one is "
            f"{torch.cuda.get_device_name(device)}; take the key out"
        )
    for block in model.modules():
        if isinstance(block, Block):
            block.attn.fp8 = block.timeattn.fp8 = block.mlp.fp8 = True
