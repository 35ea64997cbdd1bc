"""The light predictor of view D: features of dropped patches out of those of the visible ones.

The student encodes the visible tokens alone; a few narrow blocks of the same divided attention then see them
at their places, with a mask token at every other place, and predict the snapshot's features there (the idea
is MAE's; that MILES' authors used it is not known: spec/miles.md 8.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles_fast.config import PredictorConfig, VideoEncoderConfig
from miles_fast.kernels.token_gather import token_gather
from miles_fast.models.video_encoder import Block, initialize_linear_layers


class Predictor(nn.Module):
    """Visible tokens of the student (B, 1 + K, D) to predictions at M masked patches (B, M, D or E)."""

    def __init__(
        self, config: PredictorConfig, encoder: VideoEncoderConfig, num_frames: int, target_width: int
    ) -> None:
        super().__init__()
        sizes = VideoEncoderConfig(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            width=config.width,
            heads=config.heads,
        )
        self.num_frames = num_frames
        self.enter = nn.Linear(encoder.width, config.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + encoder.grid**2, config.width))
        self.temporal_embed = nn.Parameter(torch.empty(1, num_frames, config.width))
        self.blocks = nn.ModuleList(Block(sizes, "auto") for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.leave = nn.Linear(config.width, target_width)
        initialize_linear_layers(self)
        for table in (self.mask_token, self.pos_embed, self.temporal_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, tokens_BKD: Tensor, visible_BK: Tensor, masked_BM: Tensor) -> Tensor:
        """Predictions at `masked_BM`; patches are counted from 0, `tokens_BKD` begins with [CLS]."""
        entered = self.enter(tokens_BKD)
        batch, _, width = entered.shape
        num_tokens = 1 + visible_BK.shape[1] + masked_BM.shape[1]
        rows = F.pad(visible_BK + 1, (1, 0))
        places = self.mask_token.expand(batch, num_tokens, width).to(entered.dtype)
        x_BND = places.scatter(1, rows[..., None].expand(-1, -1, width), entered) + self._positions()
        for block in self.blocks:
            x_BND = block(x_BND, self.num_frames)
        return self.leave(self.norm(token_gather(x_BND, masked_BM + 1)))

    def _positions(self) -> Tensor:
        patches_TPD = self.pos_embed[0, None, 1:] + self.temporal_embed[0][:, None]
        return torch.cat([self.pos_embed[0, :1], patches_TPD.flatten(0, 1)])
