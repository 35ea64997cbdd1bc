"""Cases of biased_gelu, linear, mlp and residual_norm: what kernels/cases.py asks of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from miles_fast.kernels.cases import Inputs, short

_HALF, _FULL = torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class BiasedGeluCase:
    """M rows of D; the leaf is the hidden tensor, or with `of_bias` the bias."""

    M: int
    D: int
    dtype: torch.dtype
    of_bias: bool = False

    @property
    def name(self) -> str:
        return f"{self.M}x{self.D}-{short(self.dtype)}{'-bias' if self.of_bias else ''}"

    @property
    def forward_bytes(self) -> int:
        return 2 * self.M * self.D * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        return 3 * self.M * self.D * self.dtype.itemsize

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        hidden = (2 * torch.randn(self.M, self.D, generator=generator)).to(device, self.dtype)
        bias = torch.randn(self.D, generator=generator).to(device, self.dtype)
        d_output = torch.randn(self.M, self.D, generator=generator)
        leaf, other = (bias, hidden) if self.of_bias else (hidden, bias)
        return Inputs(
            leaf=leaf.requires_grad_(), constants=(other,), d_output=d_output.to(device, self.dtype)
        )

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        (other,) = inputs.constants
        return op(other, inputs.leaf) if self.of_bias else op(inputs.leaf, other)


def _drawn(
    scales: dict[str, tuple], leaf: str, output: tuple[int, int], device: str, dtype: torch.dtype
) -> Inputs:
    """Normal numbers of {name: (standard deviation, *shape)}; the others are constants, in their order."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: (scale * torch.randn(*shape, generator=generator)).to(device, dtype)
        for name, (scale, *shape) in scales.items()
    }
    d_output = torch.randn(*output, generator=generator).to(device, dtype)
    return Inputs(leaf=drawn.pop(leaf).requires_grad_(), constants=tuple(drawn.values()), d_output=d_output)


@dataclass(frozen=True, kw_only=True)
class _ProductsCase:
    """M rows of K numbers and weights of K x D; the leaf is one of the op's tensors, which `_LEAVES` names.

    The bytes are a bound that no product of this size comes near.
    """

    _LEAVES: ClassVar[tuple[str, ...]]
    M: int
    K: int
    D: int
    dtype: torch.dtype
    leaf: str = "x"

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}x{self.D}-{short(self.dtype)}-{self.leaf}"

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        place = self._LEAVES.index(self.leaf)
        return op(*inputs.constants[:place], inputs.leaf, *inputs.constants[place:])


@dataclass(frozen=True, kw_only=True)
class LinearCase(_ProductsCase):
    """K numbers to D."""

    _LEAVES = ("x", "weight", "bias")

    @property
    def forward_bytes(self) -> int:
        return (self.M * (self.K + self.D) + self.K * self.D) * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        return 2 * self.forward_bytes

    def inputs(self, device: str) -> Inputs:
        scales = {"x": (1.0, self.M, self.K), "weight": (self.K**-0.5, self.D, self.K), "bias": (1.0, self.D)}
        return _drawn(scales, self.leaf, (self.M, self.D), device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class MlpCase(_ProductsCase):
    """K numbers to K, D hidden ones between."""

    _LEAVES = ("x", "first", "first_bias", "second", "second_bias")

    @property
    def forward_bytes(self) -> int:
        return (self.M * (2 * self.K + 3 * self.D) + 2 * self.K * self.D) * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        return (self.M * (5 * self.D + 4 * self.K) + 4 * self.K * self.D) * self.dtype.itemsize

    def inputs(self, device: str) -> Inputs:
        scales = {
            "x": (1.0, self.M, self.K),
            "first": (2 * self.K**-0.5, self.D, self.K),
            "first_bias": (1.0, self.D),
            "second": (self.D**-0.5, self.K, self.D),
            "second_bias": (1.0, self.K),
        }
        return _drawn(scales, self.leaf, (self.M, self.K), device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class ResidualNormCase:
    """M rows of D; the leaf is one of the op's tensors. The output is the LayerNorm, or with `total` that and
    the total below it."""

    M: int
    D: int
    dtype: torch.dtype
    leaf: str = "x"
    total: bool = False

    @property
    def name(self) -> str:
        return f"{self.M}x{self.D}-{short(self.dtype)}-{self.leaf}{'-total' if self.total else ''}"

    @property
    def forward_bytes(self) -> int:
        return 2 * self.M * self.D * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        return (3 + self.total) * self.M * self.D * self.dtype.itemsize

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        names = ("weight", "bias", "branch_bias", "later_bias")
        shapes = {"x": (self.M, self.D), **dict.fromkeys(names, (self.D,))}
        drawn = {
            name: torch.randn(shape, generator=generator).to(device, self.dtype)
            for name, shape in shapes.items()
        }
        d_output = torch.randn((1 + self.total) * self.M, self.D, generator=generator)
        leaf = drawn.pop(self.leaf).requires_grad_()
        return Inputs(leaf=leaf, constants=tuple(drawn.values()), d_output=d_output.to(device, self.dtype))

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        names = ("x", "weight", "bias", "branch_bias", "later_bias")
        place = names.index(self.leaf)
        out, total = op(*inputs.constants[:place], inputs.leaf, *inputs.constants[place:])
        return torch.cat([out, total]) if self.total else out


RESIDUAL_NORM_TRAINER = (
    ResidualNormCase(M=128 * 785, D=768, dtype=_HALF),
    ResidualNormCase(M=128 * 785, D=768, dtype=_HALF, leaf="weight"),
)
RESIDUAL_NORM_SMALL = tuple(
    ResidualNormCase(M=M, D=D, dtype=dtype, leaf=leaf, total=total)
    for M, D, dtype in ((130, 40, _FULL), (70, 96, _HALF), (5, 7, torch.float16), (1, 9, _FULL))
    for leaf, total in (
        *((leaf, False) for leaf in ("x", "weight", "bias", "branch_bias")),
        *((leaf, True) for leaf in ("x", "weight", "branch_bias", "later_bias")),
    )
)


LINEAR_TRAINER = tuple(
    LinearCase(M=128 * 785, K=K, D=D, dtype=_HALF) for K, D in ((768, 2304), (768, 768), (3072, 768))
)
LINEAR_SMALL = tuple(
    LinearCase(M=M, K=K, D=D, dtype=dtype, leaf=leaf)
    for leaf in LinearCase._LEAVES
    for M, K, D, dtype in ((8200, 192, 384, _HALF), (8193, 40, 192, torch.float16), (9, 7, 5, _FULL))
)


MLP_TRAINER = tuple(MlpCase(M=128 * 785, K=768, D=3072, dtype=_HALF, leaf=leaf) for leaf in MlpCase._LEAVES)
MLP_SMALL = tuple(
    MlpCase(M=M, K=K, D=D, dtype=dtype, leaf=leaf)
    for leaf in MlpCase._LEAVES
    for M, K, D, dtype in (
        (128, 64, 256, torch.float16),
        (300, 72, 264, _HALF),
        (130, 136, 520, torch.float16),
    )
)


BIASED_GELU_TRAINER = (
    BiasedGeluCase(M=64 * 785, D=3072, dtype=_HALF),
    BiasedGeluCase(M=64 * 785, D=3072, dtype=_HALF, of_bias=True),
)
BIASED_GELU_SMALL = tuple(
    BiasedGeluCase(M=M, D=D, dtype=dtype, of_bias=of_bias)
    for of_bias in (False, True)
    for M, D, dtype in ((300, 40, _FULL), (300, 136, _HALF), (5, 7, torch.float16), (1, 1, _FULL))
)
