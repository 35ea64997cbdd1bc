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


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
