"""DeepSpeed's json, checked against this project's config."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from miles_fast.config import Config, ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """DeepSpeed's json with every `auto` filled in, and what the rest of the program needs of it."""

    tree: dict[str, Any]
    batch: int
    accumulation: int
    stage: int
    bf16: bool
    lr_scale: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What the student's weights are held in."""
        return torch.bfloat16 if self.bf16 else torch.float32


def read_ds_config(path: str | Path, config: Config, *, cuda: bool, ranks: int) -> EngineSettings:
    """Read DeepSpeed's json; `auto` is filled for bf16.enabled (on a GPU) and the schedule's total_num_steps.

    Raises ConfigError naming file, key and both values where it contradicts the config or cannot be run.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); ds.json in the repository is one"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    return check_ds_config(tree, str(path), config, cuda=cuda, ranks=ranks)


def check_ds_config(
    tree: dict[str, Any], source: str, config: Config, *, cuda: bool, ranks: int
) -> EngineSettings:
    """`read_ds_config` for json already read."""
    tree = copy.deepcopy(tree)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected an object with DeepSpeed's settings")
    if tree.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{source}: fp16.enabled = true is not supported (no loss scaling); use bf16")
    bf16 = tree.setdefault("bf16", {})
    if bf16.get("enabled", False) == "auto":
        bf16["enabled"] = cuda
    if bf16.get("enabled") and not bf16.setdefault("check_grad_overflow", True):
        raise ConfigError(
            f"{source}: bf16.check_grad_overflow = false lets gradients that are not finite into the "
            "weights; take the line out"
        )
    if config.run.precision == "fp8" and cuda and not bf16.get("enabled"):
        raise ConfigError(
            f"{source}: bf16.enabled = false, but run.precision = fp8 takes bf16 weights on a GPU; "
            "enable bf16, or take run.precision out"
        )
    batch = tree.get("train_micro_batch_size_per_gpu")
    if not isinstance(batch, int) or batch < 1:
        raise ConfigError(
            f"{source}: train_micro_batch_size_per_gpu = {batch!r}: give the clips per rank, e.g. 64"
        )
    accumulation = tree.setdefault("gradient_accumulation_steps", 1)
    product = batch * accumulation * ranks
    if tree.setdefault("train_batch_size", product) != product:
        raise ConfigError(
            f"{source}: train_batch_size = {tree['train_batch_size']}, but train_micro_batch_size_per_gpu "
            f"{batch} x gradient_accumulation_steps {accumulation} x {ranks} ranks = {product}"
        )
    schedule = tree.get("scheduler", {}).get("params", {})
    total = schedule.get("total_num_steps")
    if total == "auto":
        schedule["total_num_steps"] = config.run.steps
    elif total is not None and total != config.run.steps:
        raise ConfigError(
            f"{source}: scheduler.params.total_num_steps = {total}, but run.steps = {config.run.steps}; "
            'make them equal, or write "auto" in the json'
        )
    if "optimizer" not in tree:
        raise ConfigError(f"{source}: optimizer is missing; ds.json in the repository shows one")
    stage = tree.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage == 3 and config.run.cuda_graphs:
        raise ConfigError(
            f"{source}: zero_optimization.stage = 3 gathers weights anew for every step, which a CUDA graph "
            "cannot follow; set run.cuda_graphs: false, or stage 2"
        )
    if stage == 3 and config.run.compile:
        # DeepSpeed's own linear layer reads what differs from one to the next, so that torch.compile gives up
        # after eight layers. It lets go of gathered weights until backward, which compiled layers do anyway.
        tree["zero_optimization"].setdefault("memory_efficient_linear", False)
    _check_lr_scale(tree, source, config)
    tree.setdefault("steps_per_print", 10**9)
    # DeepSpeed's own throughput, which nothing prints, would have the host wait for the GPU twice a step.
    tree.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return EngineSettings(
        tree=tree,
        batch=batch,
        accumulation=accumulation,
        stage=stage,
        bf16=bool(bf16.get("enabled")),
        lr_scale=config.run.lr_scale,
    )


def _check_lr_scale(tree: dict[str, Any], source: str, config: Config) -> None:
    if not config.run.lr_scale:
        return
    if "lr" not in tree["optimizer"].get("params", {}):
        raise ConfigError(f"{source}: run.lr_scale needs optimizer.params.lr, the rate that it multiplies")
    schedule = tree.get("scheduler", {}).get("type")
    if schedule not in (None, "WarmupCosineLR"):
        raise ConfigError(
            f"{source}: scheduler.type = {schedule} sets one rate for all weights; run.lr_scale needs "
            "WarmupCosineLR, which multiplies each weight's own"
        )
