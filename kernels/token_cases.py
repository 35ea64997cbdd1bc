"""Cases of token_gather and feature_regression: what kernels/cases.py asks of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from miles_fast.kernels.cases import Inputs, short

_HALF, _FULL = torch.bfloat16, torch.float32


def _distinct_index(B: int, N: int, M: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(B, N, generator=generator).argsort(dim=1)[:, :M].to(dtype)


@dataclass(frozen=True, kw_only=True)
class TokenGatherCase:
    """M of N tokens of B clips. `skip` tokens in front make the op's input a view (x[:, skip:])."""

    B: int
    N: int
    M: int
    D: int
    dtype: torch.dtype
    index_dtype: torch.dtype = torch.int64
    skip: int = 0

    @property
    def name(self) -> str:
        view = f"-skip{self.skip}" if self.skip else ""
        return f"{self.B}x{self.N}x{self.M}x{self.D}-{short(self.dtype)}-{short(self.index_dtype)}{view}"

    @property
    def forward_bytes(self) -> int:
        return self.B * self.M * (2 * self.D * self.dtype.itemsize + self.index_dtype.itemsize)

    @property
    def backward_bytes(self) -> int:
        return self.B * (
            (self.M + self.N) * self.D * self.dtype.itemsize + self.M * self.index_dtype.itemsize
        )

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(self.B, self.N + self.skip, self.D, generator=generator)
        index_BM = _distinct_index(self.B, self.N, self.M, self.index_dtype, generator)
        d_output = torch.randn(self.B, self.M, self.D, generator=generator)
        return Inputs(
            leaf=whole.to(device, self.dtype).requires_grad_(),
            constants=(index_BM.to(device),),
            d_output=d_output.to(device, self.dtype),
        )

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        return op(inputs.leaf[:, self.skip :], *inputs.constants)


@dataclass(frozen=True, kw_only=True)
class FeatureRegressionCase:
    """M rows of a prediction against M rows of a target of N tokens; whole (indexed) or already gathered.

    `scale` is the size of the prediction's numbers and `closeness` how much of the target is in it: near 1
    the loss is a difference of nearly equal vectors.
    """

    B: int
    N: int
    M: int
    D: int
    dtype: torch.dtype
    target_dtype: torch.dtype | None = None
    normalization: str = "l2"
    prediction_indexed: bool = True
    target_indexed: bool = True
    index_dtype: torch.dtype = torch.int64
    skip: int = 0
    scale: float = 1.0
    closeness: float = 0.5

    @property
    def name(self) -> str:
        indexed = "p" * self.prediction_indexed + "t" * self.target_indexed
        parts = [f"{self.B}x{self.N}x{self.M}x{self.D}", self.normalization, short(self.dtype)]
        parts += [short(self.target_dtype)] if self.target_dtype else []
        parts += [f"index_{indexed}"] if indexed else []
        parts += ["int32"] if self.index_dtype == torch.int32 else []
        parts += [f"skip{self.skip}"] if self.skip else []
        parts += [f"scale{self.scale:g}"] if self.scale != 1.0 else []
        parts += [f"close{self.closeness:g}"] if self.closeness != 0.5 else []
        return "-".join(parts)

    @property
    def forward_bytes(self) -> int:
        target_itemsize = (self.target_dtype or self.dtype).itemsize
        index_bytes = (self.prediction_indexed + self.target_indexed) * self.index_dtype.itemsize
        return self.B * self.M * (self.D * (self.dtype.itemsize + target_itemsize) + index_bytes)

    @property
    def backward_bytes(self) -> int:
        rows = self.N if self.prediction_indexed else self.M
        return self.forward_bytes + self.B * rows * self.D * self.dtype.itemsize

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        num_predictions = self.N if self.prediction_indexed else self.M
        num_targets = self.N if self.target_indexed else self.M
        target = torch.randn(self.B, num_targets + self.skip, self.D, generator=generator)
        prediction = torch.randn(self.B, num_predictions + self.skip, self.D, generator=generator)
        prediction_index = target_index = None
        if self.prediction_indexed:
            prediction_index = _distinct_index(self.B, self.N, self.M, self.index_dtype, generator).to(device)
        if self.target_indexed:
            target_index = _distinct_index(self.B, self.N, self.M, self.index_dtype, generator).to(device)
        if not (self.prediction_indexed or self.target_indexed):
            prediction = self.closeness * target + (1 - self.closeness) * prediction
        return Inputs(
            leaf=(self.scale * prediction).to(device, self.dtype).requires_grad_(),
            constants=(
                target.to(device, self.target_dtype or self.dtype),
                target_index,
                prediction_index,
            ),
            d_output=torch.tensor(0.5, device=device),
        )

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        target, target_index, prediction_index = inputs.constants
        return op(
            inputs.leaf[:, self.skip :],
            target[:, self.skip :],
            target_index_BM=target_index,
            prediction_index_BM=prediction_index,
            normalization=self.normalization,
        )


# 785 = CLS + 4 frames x 196 patches; 392 masked patches are half of them; 393 visible ones include CLS.
TOKEN_GATHER_TRAINER = (
    TokenGatherCase(B=128, N=785, M=393, D=768, dtype=_HALF),
    TokenGatherCase(B=128, N=785, M=393, D=768, dtype=_FULL),
    TokenGatherCase(B=256, N=197, M=99, D=768, dtype=_HALF),
    TokenGatherCase(B=128, N=785, M=393, D=384, dtype=_HALF),
    # As view A takes the last block's rows, of 128 clips in one list, and view D its visible patches.
    TokenGatherCase(B=1, N=128 * 785, M=128 * 393, D=768, dtype=_HALF),
    TokenGatherCase(B=256, N=785, M=197, D=768, dtype=_HALF),
)
TOKEN_GATHER_SMALL = (
    TokenGatherCase(B=2, N=12, M=5, D=96, dtype=_FULL),
    TokenGatherCase(B=2, N=12, M=5, D=96, dtype=_HALF, index_dtype=torch.int32),
    TokenGatherCase(B=2, N=9, M=9, D=7, dtype=torch.float16),
    TokenGatherCase(B=3, N=11, M=4, D=7, dtype=_HALF, skip=1),
    TokenGatherCase(B=1, N=1, M=1, D=1, dtype=_FULL),
    TokenGatherCase(B=2, N=4, M=0, D=8, dtype=_FULL),
)

# The trainer has the encoders gather the rows, and passes no index: N is M.
_GATHERED = {"N": 392, "prediction_indexed": False, "target_indexed": False}
FEATURE_REGRESSION_TRAINER = (
    FeatureRegressionCase(B=128, M=392, D=768, dtype=_HALF, **_GATHERED),
    FeatureRegressionCase(B=128, M=392, D=768, dtype=_HALF, normalization="layernorm", **_GATHERED),
    FeatureRegressionCase(B=128, M=392, D=768, dtype=_HALF, normalization="none", **_GATHERED),
    FeatureRegressionCase(B=128, M=392, D=256, dtype=_HALF, **_GATHERED),
    # What whoever keeps all 785 tokens passes: index + 1, which steps over CLS.
    FeatureRegressionCase(B=128, N=785, M=392, D=768, dtype=_HALF),
    FeatureRegressionCase(B=128, N=785, M=392, D=768, dtype=_HALF, prediction_indexed=False),
)
FEATURE_REGRESSION_SMALL = (
    *(
        FeatureRegressionCase(B=2, N=12, M=5, D=96, dtype=dtype, normalization=normalization)
        for normalization in ("l2", "layernorm", "none")
        for dtype in (_FULL, _HALF, torch.float16)
    ),
    FeatureRegressionCase(B=2, N=6, M=6, D=7, dtype=_FULL, prediction_indexed=False, target_indexed=False),
    FeatureRegressionCase(B=2, N=9, M=4, D=7, dtype=_FULL, prediction_indexed=False, skip=1),
    FeatureRegressionCase(B=2, N=9, M=4, D=7, dtype=_FULL, target_indexed=False, index_dtype=torch.int32),
    FeatureRegressionCase(B=3, N=9, M=4, D=40, dtype=_HALF, target_dtype=_FULL, skip=1),
    FeatureRegressionCase(
        B=2, N=5, M=3, D=33, dtype=_FULL, target_dtype=torch.float16, normalization="layernorm"
    ),
    FeatureRegressionCase(B=1, N=1, M=1, D=96, dtype=_FULL),
    FeatureRegressionCase(B=2, N=7, M=3, D=40, dtype=_FULL, scale=1e-4),
    FeatureRegressionCase(B=2, N=7, M=3, D=40, dtype=_FULL, scale=1e-10),
    FeatureRegressionCase(B=2, N=7, M=3, D=40, dtype=_FULL, scale=0.0),
    FeatureRegressionCase(
        B=2, N=3, M=3, D=40, dtype=_FULL, prediction_indexed=False, target_indexed=False, closeness=0.999
    ),
)
