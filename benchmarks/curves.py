"""The loss of a run as configured beside the same steps as published: same seed, same data, no dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from variants import BASELINES, CONFIGURED, train_variant

# By name: the reference, the same in bf16, and the run in question.
COMPARED = (*(variant for variant in reversed(BASELINES) if "published" in variant.name), CONFIGURED)


def measure_curves(
    config_file: str, overrides: Sequence[str], ds_tree: dict[str, Any], steps: int
) -> dict[str, list[float]]:
    """Loss of every step, by variant; the first is the reference."""
    overrides = [*overrides, "model.text.dropout=0"]  # which compilers draw in another order
    curves = {}
    for variant in COMPARED:
        records, _ = train_variant(variant, config_file, overrides, ds_tree, steps, log_every=1)
        curves[variant.name] = [record["loss"] for record in records]
    return curves


def distances(curves: dict[str, list[float]]) -> dict[str, float]:
    """Mean absolute distance of each curve to the first over the last half of the steps."""
    (_, reference), *others = curves.items()
    half = len(reference) // 2
    return {name: float(np.abs(np.subtract(curve, reference))[half:].mean()) for name, curve in others}


def table(curves: dict[str, list[float]]) -> str:
    """The curves' ends and their distances to the first, for people."""
    far = distances(curves)
    lines = [f"{'':<28}{'first':>9}{'last':>9}{'distance':>10}"]
    for name, curve in curves.items():
        distance = f"{far[name]:.4f}" if name in far else "-"
        lines.append(f"{name:<28}{curve[0]:>9.4f}{curve[-1]:>9.4f}{distance:>10}")
    return "\n".join(lines)
