"""Lets timm and transformers import a torchvision whose compiled operators cannot load (a CPU-only torch).

PyPI's torchvision is built against CUDA; beside a CPU torch its import dies on the missing operator schemas
(pytorch/vision #9085, #9077). Declaring the two schemas that its Python code registers against is enough.
"""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None


def repair_torchvision() -> None:
    """Declare torchvision's nms schemas when torch has no CUDA and nobody has; call before importing timm."""
    global _library
    if torch.version.cuda is None and _library is None and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
