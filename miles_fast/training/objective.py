"""What one step computes: the student's passes and both losses, as the module that DeepSpeed trains."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles_fast.config import MethodConfig
from miles_fast.kernels.feature_regression import feature_regression
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.training.losses import start_contrast
from miles_fast.training.predictor import Predictor


class Losses(NamedTuple):
    """Scalars of one step (a NamedTuple, since ZeRO-3 looks for tensors in tuples only).

    `target_cosine` is the mean cosine of prediction and target at masked patches, `target_std` the mean over
    dimensions of the targets' standard deviation (0 = collapse); both are 0 where there are no targets.
    """

    total: Tensor
    contrastive: Tensor
    regression: Tensor
    target_cosine: Tensor
    target_std: Tensor


class Objective(nn.Module):
    """Student, and what only its losses need; views A, B and none of spec/miles.md 2.5, D of 8.3."""

    def __init__(self, model: DualEncoder, method: MethodConfig, num_frames: int) -> None:
        super().__init__()
        self.model, self.method = model, method
        if method.view == "none":
            return
        video = model.config.video
        target_width = model.config.embedding if method.regression.feature == "projected" else video.width
        if method.view == "D":
            self.predictor = Predictor(method.predictor, video, num_frames, target_width)
        else:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, video.width), std=0.02))
        self.head = _regression_head(method.regression.head, target_width)

    def forward(
        self,
        video_BTCHW: Tensor,
        token_ids_BL: Tensor,
        attention_BL: Tensor,
        masked_BM: Tensor | None = None,
        target_BMD: Tensor | None = None,
    ) -> Losses:
        """Losses of a batch; `masked_BM` counts patches from 0, `target_BMD` are the snapshot's there."""
        inputs = (video_BTCHW, token_ids_BL, attention_BL, masked_BM, target_BMD)
        text_BE, video_BE, regression, features_BMD = self.encode(*(x for x in inputs if x is not None))
        finish_contrast = start_contrast(text_BE, video_BE, self.method.contrast)
        # A copy: of a CUDA graph it is memory that the next micro step writes to.
        logged = regression.detach().clone()
        cosine = std = torch.zeros_like(logged)
        if target_BMD is not None:
            cosine, std = self.statistics(features_BMD, target_BMD)
        contrast = finish_contrast()
        total = contrast + self.method.regression.weight * regression
        return Losses(total, contrast.detach(), logged, cosine, std)

    def encode(
        self,
        video_BTCHW: Tensor,
        token_ids_BL: Tensor,
        attention_BL: Tensor,
        masked_BM: Tensor | None = None,
        target_BMD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What needs no other rank: texts and videos (B, E), regression, and what it regressed, (B, M, D)."""
        text_BE = self.model.embed_text(token_ids_BL, attention_BL)
        return text_BE, *self.encode_videos(video_BTCHW, masked_BM, target_BMD)

    def encode_videos(
        self, video_BTCHW: Tensor, masked_BM: Tensor | None = None, target_BMD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part of `encode` that takes no texts: all but the first."""
        if self.method.view == "none":
            zero = torch.zeros((), device=video_BTCHW.device)
            return self.model.embed_video(video_BTCHW), zero, zero
        assert masked_BM is not None and target_BMD is not None
        if self.method.view == "D":
            cls_BD, features_BMD = self._encode_visible(video_BTCHW, masked_BM)
        else:
            cls_BD, features_BMD = self._encode_masked(video_BTCHW, masked_BM)
            if self.method.regression.feature == "projected":
                features_BMD = self.model.vid_proj(features_BMD)
        features_BMD = self.head(features_BMD)
        regression = feature_regression(
            features_BMD, target_BMD, normalization=self.method.regression.normalization
        )
        return self.model.vid_proj(cls_BD), regression, features_BMD.detach()

    @staticmethod
    @torch.no_grad()
    def statistics(features_BMD: Tensor, target_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """`target_cosine` and `target_std` of Losses."""
        cosine = F.cosine_similarity(features_BMD.float(), target_BMD.float(), dim=-1).mean()
        return cosine, target_BMD.float().flatten(0, 1).std(dim=0).mean()

    def _marked(self, video: Tensor, masked_BM: Tensor, dtype: torch.dtype) -> Tensor:
        num_patches = video.shape[1] * self.model.config.video.grid**2
        marked_BN = torch.zeros(video.shape[0], num_patches, dtype=dtype, device=video.device)
        return marked_BN.scatter_(1, masked_BM, 1)

    def _encode_masked(self, video: Tensor, masked_BM: Tensor) -> tuple[Tensor, Tensor]:
        masked_BN = self._marked(video, masked_BM, torch.bool)
        both = self.method.view == "B"
        # One list of rows of the whole batch: all masked ones, then [CLS], with B of the clips as they are.
        batch, num_tokens = video.shape[0], 1 + masked_BN.shape[1]
        first_B = num_tokens * torch.arange(batch, device=video.device)
        masked = (1 + masked_BM + first_B[:, None]).flatten()
        rows = torch.cat([masked, first_B + batch * num_tokens if both else first_B])
        tokens = self.model.video_model(
            video, masked_BN=masked_BN, mask_token=self.mask_token, with_unmasked=both, rows_BM=rows[None]
        )[0]
        return tokens[-batch:], tokens[:-batch].unflatten(0, masked_BM.shape)

    def _encode_visible(self, video: Tensor, masked_BM: Tensor) -> tuple[Tensor, Tensor]:
        masked_BN = self._marked(video, masked_BM, torch.uint8)
        # Visible patches first, in their order: their number is known, so that the host need not wait.
        visible_BK = masked_BN.argsort(dim=1, stable=True)[:, : masked_BN.shape[1] - masked_BM.shape[1]]
        tokens = self.model.video_model(video, visible_BK=visible_BK)
        features_BMD = self.predictor(tokens, visible_BK, masked_BM)
        if self.method.contrast.clip == "full":
            tokens = self.model.video_model(video, rows_BM=torch.zeros_like(masked_BM[:, :1]))
        return tokens[:, 0], features_BMD


def _regression_head(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
