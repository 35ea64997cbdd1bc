"""The cases of both attention ops (kernels/cases.py says what a case is for)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from miles_fast.kernels.cases import Inputs


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """B clips of T frames of P patches and a CLS token, H heads of S, packed as the qkv layer writes them.

    `scale` is the size of the numbers: at 4 the softmax is nearly one-hot. The leaf is the packed qkv, or
    with `of_bias` the bias that its queries hold.
    """

    B: int
    T: int
    P: int
    H: int
    S: int
    dtype: torch.dtype
    scale: float = 1.0
    of_bias: bool = False

    @property
    def name(self) -> str:
        """Unique among the cases."""
        scale = f"-scale{self.scale:g}" if self.scale != 1.0 else ""
        bias = "-bias" if self.of_bias else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.B}x{self.T}x{self.P}x{self.H}x{self.S}-{dtype}{scale}{bias}"

    @property
    def _row_bytes(self) -> int:
        return self.B * (1 + self.T * self.P) * self.H * self.S * self.dtype.itemsize

    @property
    def forward_bytes(self) -> int:
        """qkv read, out written."""
        return 4 * self._row_bytes

    @property
    def backward_bytes(self) -> int:
        """qkv and d_out read, d_qkv written (out and weights can be computed again)."""
        return 7 * self._row_bytes

    def inputs(self, device: str) -> Inputs:
        """The number of frames is the case's own."""
        generator = torch.Generator().manual_seed(0)
        tokens = 1 + self.T * self.P
        qkv = self.scale * torch.randn(self.B, tokens, 3, self.H, self.S, generator=generator)
        d_output = torch.randn(self.B, tokens, self.H * self.S, generator=generator)
        qkv, d_output = qkv.to(device, self.dtype), d_output.to(device, self.dtype)
        if self.of_bias:
            bias = torch.randn(self.H * self.S, generator=generator).to(device, self.dtype)
            return Inputs(leaf=bias.requires_grad_(), constants=(qkv,), d_output=d_output)
        return Inputs(leaf=qkv.requires_grad_(), constants=(), d_output=d_output)

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        """`op(qkv, num_frames)`, or `op(qkv, num_frames, query_bias)`."""
        return op(*inputs.constants, self.T, inputs.leaf) if self.of_bias else op(inputs.leaf, self.T)


_HALF, _FULL = torch.bfloat16, torch.float32

# 4 x 196 patches is the published ViT-B/16; 256 = 16 x 16 patches is patch 14 at 224 pixels.
TRAINER = (
    AttentionCase(B=64, T=4, P=196, H=12, S=64, dtype=_HALF),
    AttentionCase(B=256, T=1, P=196, H=12, S=64, dtype=_HALF),
    AttentionCase(B=4, T=16, P=196, H=12, S=64, dtype=_HALF),
    AttentionCase(B=64, T=4, P=49, H=12, S=64, dtype=_HALF),
    AttentionCase(B=64, T=4, P=256, H=6, S=64, dtype=_HALF),
    AttentionCase(B=64, T=4, P=196, H=12, S=64, dtype=_HALF, of_bias=True),
)
SMALL = (
    AttentionCase(B=2, T=4, P=4, H=2, S=16, dtype=_FULL),
    AttentionCase(B=2, T=4, P=4, H=2, S=16, dtype=_HALF),
    AttentionCase(B=1, T=3, P=5, H=2, S=32, dtype=torch.float16),
    AttentionCase(B=2, T=1, P=9, H=1, S=16, dtype=_FULL),
    AttentionCase(B=1, T=2, P=1, H=3, S=16, dtype=_FULL),
    AttentionCase(B=1, T=1, P=1, H=1, S=16, dtype=_FULL),
    AttentionCase(B=1, T=5, P=7, H=2, S=24, dtype=_FULL),
    AttentionCase(B=1, T=4, P=6, H=2, S=16, dtype=_FULL, scale=4.0),
    AttentionCase(B=1, T=16, P=3, H=1, S=16, dtype=_HALF),
    AttentionCase(B=1, T=2, P=33, H=1, S=16, dtype=_FULL),
    AttentionCase(B=2, T=3, P=37, H=2, S=24, dtype=_FULL, of_bias=True),
    AttentionCase(B=2, T=4, P=4, H=2, S=16, dtype=_HALF, of_bias=True),
)
