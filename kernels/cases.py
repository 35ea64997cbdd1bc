"""The cases every op is tested and timed on: shapes, inputs, bytes that must move, the rule of correctness.

tests/kernels runs the small cases under the interpreter and all of them on a GPU; benchmarks/micro.py times
the trainer's cases and refuses an op that breaks the rule. A case of another op (attention) needs only what
`Case` names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from miles_fast.kernels.dispatch import INTERPRETED


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One op call: `leaf` gets the gradient, `constants` do not, `d_output` is what arrives from above."""

    leaf: torch.Tensor
    constants: tuple[torch.Tensor | None, ...]
    d_output: torch.Tensor


class Case(Protocol):
    """A shape, dtype and variant of one op."""

    @property
    def name(self) -> str:
        """Unique among the cases of its op."""

    @property
    def forward_bytes(self) -> int:
        """Bytes any implementation must read and write forward."""

    @property
    def backward_bytes(self) -> int:
        """The same for backward alone."""

    def inputs(self, device: str) -> Inputs:
        """Seeded inputs in the case's dtype; the same on every device."""

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        """`op` (fused or reference) on these inputs."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        return f"{self.B}x{self.N}x{self.M}x{self.D}-{_short(self.dtype)}-{_short(self.index_dtype)}{view}"

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
        parts = [f"{self.B}x{self.N}x{self.M}x{self.D}", self.normalization, _short(self.dtype)]
        parts += [_short(self.target_dtype)] if self.target_dtype else []
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


_HALF, _FULL = torch.bfloat16, torch.float32

# 785 = CLS + 4 frames x 196 patches; 392 masked patches are half of them; 393 visible ones include CLS.
TOKEN_GATHER_TRAINER = (
    TokenGatherCase(B=128, N=785, M=393, D=768, dtype=_HALF),
    TokenGatherCase(B=128, N=785, M=393, D=768, dtype=_FULL),
    TokenGatherCase(B=256, N=197, M=99, D=768, dtype=_HALF),
    TokenGatherCase(B=128, N=785, M=393, D=384, dtype=_HALF),
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


@dataclass(frozen=True, kw_only=True)
class BiasedGeluCase:
    """M rows of D; the leaf is the hidden tensor, or with `of_bias` the bias."""

    M: int
    D: int
    dtype: torch.dtype
    of_bias: bool = False

    @property
    def name(self) -> str:
        return f"{self.M}x{self.D}-{_short(self.dtype)}{'-bias' if self.of_bias else ''}"

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


@dataclass(frozen=True, kw_only=True)
class LinearGeluCase:
    """M rows of K numbers to D; the leaf is one of `x`, `weight` and `bias`. The bytes are a bound no product
    of this size comes near."""

    M: int
    K: int
    D: int
    dtype: torch.dtype
    leaf: str = "x"

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}x{self.D}-{_short(self.dtype)}-{self.leaf}"

    @property
    def forward_bytes(self) -> int:
        return (self.M * (self.K + 2 * self.D) + self.K * self.D) * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        return (self.M * (2 * self.D + 2 * self.K) + 2 * self.K * self.D) * self.dtype.itemsize

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        scales = {
            "x": (1.0, self.M, self.K),
            "weight": (2 * self.K**-0.5, self.D, self.K),
            "bias": (1.0, self.D),
        }
        drawn = {
            name: (scale * torch.randn(*shape, generator=generator)).to(device, self.dtype)
            for name, (scale, *shape) in scales.items()
        }
        d_output = torch.randn(self.M, self.D, generator=generator).to(device, self.dtype)
        leaf = drawn.pop(self.leaf).requires_grad_()
        return Inputs(leaf=leaf, constants=tuple(drawn.values()), d_output=d_output)

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        place = ("x", "weight", "bias").index(self.leaf)
        return op(*inputs.constants[:place], inputs.leaf, *inputs.constants[place:])


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
        return f"{self.M}x{self.D}-{_short(self.dtype)}-{self.leaf}{'-total' if self.total else ''}"

    @property
    def forward_bytes(self) -> int:
        return (3 + self.total) * self.M * self.D * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        return (3 + self.total) * self.M * self.D * self.dtype.itemsize

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (self.M, self.D), "branch": (self.M, self.D), "weight": (self.D,), "bias": (self.D,)}
        shapes |= {"branch_bias": (self.D,), "later_bias": (self.D,)}
        drawn = {
            name: torch.randn(shape, generator=generator).to(device, self.dtype)
            for name, shape in shapes.items()
        }
        d_output = torch.randn((1 + self.total) * self.M, self.D, generator=generator)
        leaf = drawn.pop(self.leaf).requires_grad_()
        return Inputs(leaf=leaf, constants=tuple(drawn.values()), d_output=d_output.to(device, self.dtype))

    def call(self, op: Callable, inputs: Inputs) -> torch.Tensor:
        names = ("x", "branch", "weight", "bias", "branch_bias", "later_bias")
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
        *((leaf, False) for leaf in ("x", "branch", "weight", "bias", "branch_bias")),
        *((leaf, True) for leaf in ("x", "weight", "branch_bias", "later_bias")),
    )
)


LINEAR_GELU_TRAINER = tuple(
    LinearGeluCase(M=128 * 785, K=768, D=3072, dtype=_HALF, leaf=leaf) for leaf in ("x", "weight", "bias")
)
LINEAR_GELU_SMALL = tuple(
    LinearGeluCase(M=M, K=K, D=D, dtype=dtype, leaf=leaf)
    for leaf in ("x", "weight", "bias")
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


@contextlib.contextmanager
def unwritten_memory_is_nan():
    """Deterministic algorithms and NaN in every uninitialised tensor, so that a row nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def output_and_gradient(case: Case, op: Callable, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What `op` returns for a case, and the gradient of its leaf."""
    output = case.call(op, inputs)
    (gradient,) = torch.autograd.grad(output, inputs.leaf, inputs.d_output.to(output.dtype))
    return output.detach(), gradient


def violations(case: Case, op: Callable, reference: Callable, device: str) -> list[str]:
    """How `op` breaks the rule; empty when it keeps it, for the output and for the gradient alike:

        err(op, float64) <= 2 * err(reference in the same dtype, float64) + tiny

    err is the largest absolute difference to the reference computed in float64 from the same numbers; tiny is
    four float32 steps of the largest expected number. Under the interpreter bfloat16 gets one bfloat16 step
    more: it truncates where a GPU rounds to nearest.
    """

    def widen(tensor):
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    inputs = case.inputs(device)
    with unwritten_memory_is_nan():
        found = output_and_gradient(case, op, inputs)
    plain = output_and_gradient(case, reference, inputs)
    wide_inputs = Inputs(
        leaf=inputs.leaf.detach().double().requires_grad_(),
        constants=tuple(widen(constant) for constant in inputs.constants),
        d_output=inputs.d_output.double(),
    )
    exact = output_and_gradient(case, reference, wide_inputs)
    broken = []
    for what, got, same_dtype, expected in zip(("output", "gradient"), found, plain, exact, strict=True):
        if got.dtype != same_dtype.dtype or got.shape != expected.shape:
            broken.append(
                f"{what}: {got.dtype} {tuple(got.shape)} instead of {same_dtype.dtype} {expected.shape}"
            )
            continue
        if expected.numel() == 0:
            continue
        error, plain_error = ((tensor.double() - expected).abs().max() for tensor in (got, same_dtype))
        step = 4 * torch.finfo(torch.float32).eps
        if INTERPRETED and got.dtype == torch.bfloat16:
            step += torch.finfo(torch.bfloat16).eps
        bound = 2 * plain_error + step * expected.abs().max()
        # Written so that NaN breaks the rule.
        if not bool(error <= bound):
            broken.append(
                f"{what}: error {float(error):.3e} > {float(bound):.3e} (plain {float(plain_error):.3e})"
            )
    return broken
