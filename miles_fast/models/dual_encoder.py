"""The dual encoder: both towers and their projections into one space, under the published key names."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles_fast.config import ModelConfig, TextEncoderConfig
from miles_fast.models.compilation import compile_each
from miles_fast.models.image_weights import image_weights, load_image_weights
from miles_fast.models.text_encoder import build_text_encoder
from miles_fast.models.video_encoder import SpaceTimeTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DualEncoder(nn.Module):
    """`text_model`, `video_model`, `text_proj` (ReLU before the linear, as published) and `vid_proj`."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.text_model = build_text_encoder(config.text, vocabulary_size)
        self.video_model = SpaceTimeTransformer(config.video, config.attention)
        self.text_proj = nn.Sequential(nn.ReLU(), nn.Linear(self.text_model.config.dim, config.embedding))
        self.vid_proj = nn.Sequential(nn.Linear(config.video.width, config.embedding))
        self.config = self._resolve(config)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def _resolve(self, config: ModelConfig) -> ModelConfig:
        text = self.text_model.config
        sizes = TextEncoderConfig(
            tokenizer=config.text.tokenizer_source,
            width=text.dim,
            depth=text.n_layers,
            heads=text.n_heads,
            hidden=text.hidden_dim,
            max_positions=text.max_position_embeddings,
            dropout=text.dropout,
        )
        return dataclasses.replace(config, text=sizes, video=dataclasses.replace(config.video, weights=None))

    @property
    def vocabulary_size(self) -> int:
        """Rows of the word embedding."""
        return self.text_model.config.vocab_size

    def compile_layers(self, memory_budget: float = 1.0) -> None:
        """Have what both towers run layer by layer compiled: worth it for thousands of clips.

        `memory_budget` is the video encoder's: captions take little, and their encoder drops out.
        """
        self.video_model.compile_layers(memory_budget)
        compile_each(self.text_model.transformer.layer)

    def embed_text(self, token_ids_BL: Tensor, attention_BL: Tensor) -> Tensor:
        """Captions in the shared space, not normalised: (B, L), (B, L) -> (B, E)."""
        # Of a mask (B, L) transformers asks on the host whether it masks anything, which waits for the GPU.
        mask_B1LL = attention_BL[:, None, None].bool().expand(-1, 1, attention_BL.shape[1], -1)
        hidden_BLD = self.text_model(input_ids=token_ids_BL, attention_mask=mask_B1LL).last_hidden_state
        return self.text_proj(hidden_BLD[:, 0])

    def video_features(self, video_BTCHW: Tensor) -> Tensor:
        """Normalised pixels (B, T, 3, H, W) -> [CLS] after the final LayerNorm, before projection: (B, D)."""
        cls_B1 = torch.zeros(video_BTCHW.shape[0], 1, dtype=torch.long, device=video_BTCHW.device)
        return self.video_model(video_BTCHW, rows_BM=cls_B1)[:, 0]

    def embed_video(self, video_BTCHW: Tensor) -> Tensor:
        """Normalised pixels (B, T, 3, H, W) -> clips in the shared space, not normalised: (B, E)."""
        return self.vid_proj(self.video_features(video_BTCHW))


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension in float32, with the published floor of 1e-8 on the norm (spec 1.4)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-8)


def build_dual_encoder(config: ModelConfig, vocabulary_size: int) -> DualEncoder:
    """A dual encoder with the pretrained weights that `config` names, random elsewhere."""
    model = DualEncoder(config, vocabulary_size)
    if config.video.weights is not None:
        load_image_weights(model.video_model, image_weights(config.video.weights), config.video.weights)
    return model
