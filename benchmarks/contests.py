"""What each op is timed against, at which cases, and which launch parameters a sweep may try."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from miles_fast.kernels import (
    attention_cases,
    biased_gelu,
    cases,
    feature_regression,
    layer_cases,
    linear,
    linear_gelu,
    mlp,
    residual_norm,
    space_attention,
    temporal_attention,
    token_cases,
    token_gather,
)
from miles_fast.models.attention import divided_attention

SWEEP_ROWS = (1, 2, 4, 8, 16, 32)
SWEEP_WARPS = (1, 2, 4, 8)
# A tile larger than this many numbers a thread only spills.
SWEEP_NUMBERS_PER_THREAD = 64


@dataclass(frozen=True, kw_only=True)
class LaunchTable:
    """A launch table of an op's, the direction it serves, and what a sweep puts there for a case."""

    name: str
    entries: dict[Any, tuple]
    candidates: Callable[[Any], list[tuple]]

    @property
    def backward(self) -> bool:
        """Whether the table serves the backward pass."""
        return self.name.startswith("backward")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """An op, what it is timed against, where, and its launch tables; `key` is a case's entry in them.

    `flops` are those of a case's matrix products forward, of an op that has any.
    """

    op: Callable
    reference: Callable
    rivals: dict[str, Callable]
    trainer_cases: tuple[cases.Case, ...]
    tables: tuple[LaunchTable, ...]
    key: Callable[[Any], Any]
    flops: Callable[[Any], int] | None = None


def _block_width(case: Any) -> int:
    return _power_of_two(case.D)


def _rows_and_warps(case: Any) -> list[tuple[int, ...]]:
    numbers = SWEEP_NUMBERS_PER_THREAD * 32
    return [(r, w) for r in SWEEP_ROWS for w in SWEEP_WARPS if r * _block_width(case) <= numbers * w]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _both_tables(op: Any, candidates: Callable[[Any], list[tuple]]) -> tuple[LaunchTable, ...]:
    return (
        LaunchTable(name="forward", entries=op.LAUNCH_FORWARD, candidates=candidates),
        LaunchTable(name="backward", entries=op.LAUNCH_BACKWARD, candidates=candidates),
    )


def _listed(*candidates: tuple) -> Callable[[Any], list[tuple]]:
    return lambda case: list(candidates)


# (query rows, key rows, warps, stages, most registers): those that compile without spills at 197 rows of 64.
_SPACE_FORWARD = _listed(
    (128, 64, 8, 3, None),
    (128, 64, 8, 2, None),
    (128, 32, 8, 3, None),
    (64, 64, 4, 2, None),
    (64, 64, 4, 3, None),
    (64, 32, 4, 2, None),
    (64, 32, 4, 3, None),
    (64, 32, 4, 4, None),
    (128, 32, 4, 3, None),
    (128, 64, 4, 3, None),
    (64, 128, 4, 2, None),
    (256, 64, 16, 2, None),
)
# (rows a step, steps, columns, warps)
_GELU_BACKWARD = _listed(
    (16, 16, 64, 2),
    (8, 32, 128, 2),
    (32, 8, 64, 4),
    (32, 8, 128, 4),
    (16, 8, 128, 4),
    (16, 16, 256, 4),
    (8, 32, 256, 4),
    (8, 32, 512, 4),
    (16, 16, 256, 8),
    (32, 16, 256, 8),
    (64, 8, 64, 4),
)
# (rows a step, programs per multiprocessor, warps, stages)
_RESIDUAL_NORM = _listed(
    (2, 3, 4, 4),
    (2, 3, 4, 3),
    (2, 4, 4, 3),
    (2, 2, 4, 4),
    (2, 2, 4, 3),
    (2, 6, 4, 3),
    (2, 12, 4, 3),
    (2, 3, 2, 3),
    (1, 6, 2, 3),
    (1, 12, 2, 3),
    (1, 4, 4, 4),
    (4, 3, 4, 3),
    (4, 3, 8, 3),
    (4, 2, 8, 4),
)
# (rows, columns and depth of a tile, slices, warps, stages)
_LINEAR_GELU = _listed(
    (128, 256, 64, 2, 8, 4),
    (128, 256, 64, 2, 8, 3),
    (128, 256, 128, 2, 8, 2),
    (256, 128, 64, 2, 8, 4),
    (256, 128, 64, 1, 8, 3),
    (128, 128, 64, 1, 4, 4),
    (128, 128, 64, 2, 8, 4),
)
_SPACE_KEY = _listed(
    (32, 128, 8, 2, 128),
    (16, 128, 8, 2, 128),
    (64, 64, 4, 2, None),
    (64, 64, 4, 3, None),
    (32, 64, 4, 2, None),
    (32, 64, 4, 3, None),
    (32, 64, 4, 4, None),
    (32, 128, 4, 3, None),
    (64, 128, 8, 2, None),
    (32, 256, 16, 2, 128),
)


def _eager_and_compiled(reference: Callable) -> dict[str, Callable]:
    return {"eager": reference, "compiled": torch.compile(reference, fullgraph=True, dynamic=False)}


def _attention_flops(case: attention_cases.AttentionCase, keys: int) -> int:
    patches = case.T * case.P
    return 4 * case.B * case.H * case.S * (patches * keys + patches + 1)  # [CLS] sees every token


def _backends(axis: str) -> dict[str, Callable]:
    def run(qkv: torch.Tensor, num_frames: int, *bias: torch.Tensor, backend: str) -> torch.Tensor:
        return divided_attention(qkv, num_frames, axis, backend, *bias)

    names = ["sdpa", *(["flash"] if importlib.util.find_spec("flash_attn") else [])]
    eager = {name: partial(run, backend=name) for name in names}
    return {**eager, "sdpa compiled": torch.compile(eager["sdpa"], dynamic=False)}


CONTESTS = {
    "token_gather": Contest(
        op=token_gather.token_gather,
        reference=token_gather.token_gather_reference,
        rivals=_eager_and_compiled(token_gather.token_gather_reference),
        trainer_cases=token_cases.TOKEN_GATHER_TRAINER,
        tables=_both_tables(token_gather, _rows_and_warps),
        key=_block_width,
    ),
    "biased_gelu": Contest(
        op=biased_gelu.biased_gelu,
        reference=biased_gelu.biased_gelu_reference,
        rivals=_eager_and_compiled(biased_gelu.biased_gelu_reference),
        trainer_cases=layer_cases.BIASED_GELU_TRAINER,
        tables=(
            LaunchTable(name="backward", entries=biased_gelu.LAUNCH_BACKWARD, candidates=_GELU_BACKWARD),
        ),
        key=_block_width,
    ),
    "linear": Contest(
        op=linear.linear,
        reference=torch.nn.functional.linear,
        rivals={"cuBLAS": torch.nn.functional.linear},
        trainer_cases=layer_cases.LINEAR_TRAINER,
        tables=(),
        key=_block_width,
        flops=lambda case: 2 * case.M * case.K * case.D,
    ),
    "mlp": Contest(
        op=mlp.mlp,
        reference=mlp.mlp_reference,
        rivals=_eager_and_compiled(mlp.mlp_reference),
        trainer_cases=layer_cases.MLP_TRAINER,
        tables=(LaunchTable(name="forward", entries=linear_gelu.LAUNCH_FORWARD, candidates=_LINEAR_GELU),),
        key=_block_width,
        flops=lambda case: 4 * case.M * case.K * case.D,
    ),
    "residual_norm": Contest(
        op=residual_norm.residual_norm,
        reference=residual_norm.residual_norm_reference,
        rivals=_eager_and_compiled(residual_norm.residual_norm_reference),
        trainer_cases=layer_cases.RESIDUAL_NORM_TRAINER,
        tables=(
            LaunchTable(name="backward", entries=residual_norm.LAUNCH_BACKWARD, candidates=_RESIDUAL_NORM),
        ),
        key=_block_width,
    ),
    "feature_regression": Contest(
        op=feature_regression.feature_regression,
        reference=feature_regression.feature_regression_reference,
        rivals=_eager_and_compiled(feature_regression.feature_regression_reference),
        trainer_cases=token_cases.FEATURE_REGRESSION_TRAINER,
        tables=_both_tables(feature_regression, _rows_and_warps),
        key=_block_width,
    ),
    "temporal_attention": Contest(
        op=temporal_attention.temporal_attention,
        reference=temporal_attention.temporal_attention_reference,
        rivals=_backends("time"),
        trainer_cases=attention_cases.TRAINER,
        tables=_both_tables(
            temporal_attention, _listed((32, 1), (32, 2), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8))
        ),
        key=lambda case: (_power_of_two(case.T), _power_of_two(case.S)),
        flops=lambda case: _attention_flops(case, case.T + 1),
    ),
    "space_attention": Contest(
        op=space_attention.space_attention,
        reference=space_attention.space_attention_reference,
        rivals=_backends("space"),
        trainer_cases=attention_cases.TRAINER,
        tables=(
            LaunchTable(name="forward", entries=space_attention.LAUNCH_FORWARD, candidates=_SPACE_FORWARD),
            LaunchTable(
                name="backward query",
                entries=space_attention.LAUNCH_BACKWARD_QUERY,
                candidates=_SPACE_FORWARD,
            ),
            LaunchTable(
                name="backward key", entries=space_attention.LAUNCH_BACKWARD_KEY, candidates=_SPACE_KEY
            ),
        ),
        key=lambda case: (_power_of_two(case.P + 1), _power_of_two(case.S)),
        flops=lambda case: _attention_flops(case, case.P + 1),
    ),
}
