"""The loss of a run as configured beside the same steps as published: same seed, same data, no dropout.

And that of fp8 linear layers beside bf16's, measured by how far two seeds of bf16 are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from variants import BASELINES, BF16, CONFIGURED, FP8, Experiment, Variant, train_variant

from miles_fast.config_tree import load_config

# By name: the reference, the same in bf16, and the run in question.
COMPARED = (*(variant for variant in reversed(BASELINES) if "published" in variant.name), CONFIGURED)
SMOOTHED = 20  # steps of the running mean that two seeds' losses are compared by


def measure_curves(experiment: Experiment, compared: Sequence[Variant] = COMPARED) -> dict[str, list[float]]:
    """Loss of every step, by variant; the first is the reference.

    Raises ConfigError before the first step where one of them cannot be run.
    """
    # Compilers draw it in another order.
    experiment = replace(experiment, overrides=[*experiment.overrides, "model.text.dropout=0"])
    for variant in compared:
        experiment.configs(variant)
    curves = {}
    for variant in compared:
        records, _ = train_variant(variant, experiment, log_every=1)
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


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Distances of smoothed losses, in nats, from bf16's: fp8's of the same seed, bf16's of another."""

    fp8_mean: float
    fp8_largest: float
    seed_mean: float
    seed_largest: float

    @property
    def within(self) -> bool:
        """Whether fp8 is no further off than the other seed, on average and at its furthest."""
        return self.fp8_mean <= self.seed_mean and self.fp8_largest <= self.seed_largest


def fp8_and_seeds(config_file: str, overrides: Sequence[str]) -> list[Variant]:
    """What `spread` compares, in its order: bf16, bf16 with the next seed, fp8."""
    seed = load_config(config_file, overrides).run.seed
    return [
        replace(one, name=f"{one.name}, seed {run}", overrides=(*one.overrides, f"run.seed={run}"))
        for one, run in ((BF16, seed), (BF16, seed + 1), (FP8, seed))
    ]


def spread(curves: dict[str, list[float]]) -> Spread:
    """Distances between the curves of `fp8_and_seeds`, each a running mean over SMOOTHED steps (or all)."""
    window = min(SMOOTHED, *map(len, curves.values()))
    reference, *others = (np.convolve(c, np.full(window, 1 / window), "valid") for c in curves.values())
    seed, fp8 = (np.abs(other - reference) for other in others)
    return Spread(
        fp8_mean=float(fp8.mean()),
        fp8_largest=float(fp8.max()),
        seed_mean=float(seed.mean()),
        seed_largest=float(seed.max()),
    )


def verdict(found: Spread) -> str:
    """The distances for people."""
    return (
        f"fp8 from bf16: {found.fp8_mean:.4f} on average, {found.fp8_largest:.4f} at most; the other seed: "
        f"{found.seed_mean:.4f}, {found.seed_largest:.4f}: fp8 is {'' if found.within else 'not '}within the "
        "spread of two seeds"
    )
