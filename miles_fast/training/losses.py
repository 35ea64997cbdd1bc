"""Video-text contrast over all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_fast.config import ContrastConfig
from miles_fast.distributed import rank, start_gather, world_size
from miles_fast.models.dual_encoder import unit


def contrastive_loss(text_BE: Tensor, video_BE: Tensor, config: ContrastConfig) -> Tensor:
    """Both directions of the softmax contrast, summed without a factor 1/2 (spec/miles.md 2.1), in float32.

    Each rank scores its own rows against the rows of all ranks, O(B * W B) memory; averaged over ranks, value
    and gradient are those of one process on the joined batch. Rows need not be normalised.
    """
    return start_contrast(text_BE, video_BE, config)()


def start_contrast(text_BE: Tensor, video_BE: Tensor, config: ContrastConfig) -> Callable[[], Tensor]:
    """Start `contrastive_loss`; the result ends it, and what is called in between runs while rows travel."""
    text_BE, video_BE = unit(text_BE), unit(video_BE)
    finish_gather = start_gather(torch.stack([text_BE, video_BE], dim=1))

    def finish() -> Tensor:
        texts, videos = finish_gather().unbind(1)
        batch = text_BE.shape[0]
        own = torch.arange(batch, device=text_BE.device) + rank() * batch
        text_to_video = F.cross_entropy(text_BE @ videos.T / config.temperature, own)
        video_to_text = F.cross_entropy(video_BE @ texts.T / config.temperature, own)
        loss = text_to_video + video_to_text
        scale = 1 / world_size() if config.grad_scale == "official" else float(config.grad_scale)
        if scale == 1.0:
            return loss
        return loss * scale + (loss * (1 - scale)).detach()

    return finish
