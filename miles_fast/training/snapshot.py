"""The snapshot: a slowly following copy of the student's video encoder; it supplies the targets."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from miles_fast.config import RegressionConfig, SnapshotConfig
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.training.averages import SharedAverage, WholeAverage


class Snapshot:
    """Video encoder and projection, averaged in float32, never in optimizer or export.

    Made from the student before DeepSpeed partitions it. `dtype` is what the encoder computes in; the average
    stays float32, since at a momentum of 0.9995 one step moves a weight by less than half of bf16's spacing.
    `shared`: the student becomes one of ZeRO 3, whose ranks share the average out as they do the student.
    """

    def __init__(
        self,
        student: DualEncoder,
        config: SnapshotConfig,
        regression: RegressionConfig,
        *,
        total_steps: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        self.config, self.regression, self.total_steps = config, regression, total_steps
        self.shared = shared
        parts = nn.ModuleDict({"video_model": student.video_model, "vid_proj": student.vid_proj})
        self._modules = copy.deepcopy(parts).requires_grad_(False).eval().to(device=device, dtype=dtype)
        self.shapes = {name: p.shape for name, p in parts.named_parameters()}
        kind = SharedAverage if shared else WholeAverage
        self._average = kind(list(parts.parameters()), list(self._modules.parameters()))
        self._student: DualEncoder | None = None
        self._followed: list[nn.Parameter] = []

    @property
    def video_model(self) -> nn.Module:
        """The encoder that `encode` runs."""
        return self._modules["video_model"]

    @torch.no_grad()
    def encode(self, video_BTCHW: Tensor, masked_BM: Tensor) -> Tensor:
        """Targets of the unmasked clips at patches counted from 0: (B, M, D), or (B, M, E) projected."""
        tokens = self.video_model(video_BTCHW, rows_BM=masked_BM + 1)
        return self._modules["vid_proj"](tokens) if self.regression.feature == "projected" else tokens

    def momentum(self, step: int) -> float:
        """Weight of the old average at optimizer step `step` (1-based): a cosine between the two."""
        first, final = self.config.momentum, self.config.final_momentum
        return final - (final - first) * (math.cos(math.pi * step / self.total_steps) + 1) / 2

    @torch.no_grad()
    def follow(self, student: DualEncoder, step: int, *, moved: bool = True) -> None:
        """Move towards the student after optimizer step `step` (1-based), as `config.update` says.

        Where a skipped step has not `moved` the student there is nothing to average; a copy that is due is
        one of the student as it was, and is not put off by a whole period. All ranks must call it.
        """
        if self.config.update == "frozen" or not (moved or self.config.update == "copy"):
            return
        if self.config.update == "copy" and step % self.config.every:
            return
        share = 1.0 if self.config.update == "copy" else 1 - self.momentum(step)
        # Looking for them takes the host milliseconds, for which a GPU waits.
        if student is not self._student:
            parts = nn.ModuleDict({"video_model": student.video_model, "vid_proj": student.vid_proj})
            self._student, self._followed = student, list(parts.parameters())
            assert len(self._followed) == len(self.shapes)
        self._average.follow(self._followed, share)

    def state_dict(self) -> dict[str, Tensor]:
        """The float32 average by parameter name; a shared one's is the rank's elements of the flattened."""
        return {n: t.detach() for n, t in zip(self.shapes, self._average.tensors, strict=True) if t.numel()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a whole average, on every rank. Raises ValueError when names differ."""
        if set(state) != set(self.shapes):
            raise ValueError(f"snapshot has other weights: {sorted(set(state) ^ set(self.shapes))[:5]}")
        self._average.load([state[name] for name in self.shapes])
