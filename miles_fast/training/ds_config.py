"""DeepSpeed's json, checked against this project's config."""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from miles_fast.config import Config, ConfigError
from miles_fast.files import unique_keys

# Of DeepSpeed's keys, which it reads by name and does not check: those that a slip of the pen would undo.
_KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer"),
    *("scheduler", "gradient_clipping", "bf16", "fp16", "data_types", "zero_optimization", "timers"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print"),
)
_SECTIONS = ("optimizer", "scheduler", "bf16", "fp16", "data_types", "zero_optimization", "timers")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """DeepSpeed's json with every `auto` filled in, where it stood, and what else is needed of it."""

    tree: dict[str, Any]
    source: str
    batch: int
    accumulation: int
    stage: int
    bf16: bool
    lr_scale: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What the student's weights are held in."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def live_parameters(self) -> int:
        """Weights that ZeRO 3 keeps gathered at most, beside a rank's own."""
        return int(self.tree["zero_optimization"].get("stage3_max_live_parameters", 10**9))  # DeepSpeed's


def read_ds_config(path: str | Path, config: Config, *, cuda: bool, ranks: int) -> EngineSettings:
    """Read DeepSpeed's json; `auto` is filled for bf16.enabled (on a GPU) and the schedule's total_num_steps.

    Raises ConfigError naming file, key and both values where it contradicts the config or cannot be run.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(), object_pairs_hook=unique_keys)
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
    _check_shape(tree, source)
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
    if not _counts(batch):
        raise ConfigError(
            f"{source}: train_micro_batch_size_per_gpu = {batch!r}: give the clips per rank, e.g. 64"
        )
    accumulation = tree.setdefault("gradient_accumulation_steps", 1)
    if not _counts(accumulation):
        raise ConfigError(
            f"{source}: gradient_accumulation_steps = {accumulation!r}: give passes a step, e.g. 1"
        )
    product = batch * accumulation * ranks
    if tree.setdefault("train_batch_size", product) != product:
        raise ConfigError(
            f"{source}: train_batch_size = {tree['train_batch_size']}, but train_micro_batch_size_per_gpu "
            f"{batch} x gradient_accumulation_steps {accumulation} x {ranks} ranks = {product}"
        )
    clipping = tree.get("gradient_clipping", 0.0)
    if not isinstance(clipping, int | float) or not clipping >= 0:
        raise ConfigError(
            f"{source}: gradient_clipping = {clipping!r}: give the largest norm, e.g. 1.0, or 0 for none"
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
    if not isinstance(tree.get("optimizer", {}).get("type"), str):
        raise ConfigError(f"{source}: optimizer.type is missing; ds.json in the repository shows one")
    stage = tree.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage == 3:
        _check_stage_3(tree["zero_optimization"], source, config)
    _check_lr_scale(tree, source, config)
    adam = tree["optimizer"]["type"].lower() in ("adam", "adamw")
    if adam and not cuda and "offload_optimizer" not in tree["zero_optimization"]:
        # DeepSpeed's own would be compiled first, which takes minutes and, once killed, waits forever.
        tree["optimizer"].setdefault("params", {}).setdefault("torch_adam", True)
    tree.setdefault("steps_per_print", 10**9)
    # DeepSpeed's own throughput, which nothing prints, would have the host wait for the GPU twice a step.
    tree.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return EngineSettings(
        tree=tree,
        source=source,
        batch=batch,
        accumulation=accumulation,
        stage=stage,
        bf16=bool(bf16.get("enabled")),
        lr_scale=config.run.lr_scale,
    )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_shape(tree: dict[str, Any], source: str) -> None:
    for key in set(tree) - set(_KEYS):
        if meant := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85):
            raise ConfigError(f"{source}: unknown key {key!r}; did you mean {meant[0]!r}?")
    for name in _SECTIONS:
        section = tree.get(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: {name} = {section!r}: give an object, or take it out")
        if not isinstance(section.get("params", {}), dict):
            raise ConfigError(f"{source}: {name}.params = {section['params']!r}: give an object")
    if unknown := set(tree.get("data_types", {})) - {"grad_accum_dtype"}:
        raise ConfigError(f"{source}: data_types.{min(unknown)}: only grad_accum_dtype is read there")


def _check_stage_3(zero: dict[str, Any], source: str, config: Config) -> None:
    if config.run.cuda_graphs:
        raise ConfigError(
            f"{source}: zero_optimization.stage = 3 gathers weights anew for every step, which a CUDA graph "
            "cannot follow; set run.cuda_graphs: false, or stage 2"
        )
    if config.run.freeze:
        raise ConfigError(
            f"{source}: zero_optimization.stage = 3 does not give frozen weights (run.freeze) back whole; "
            "set stage 0, 1 or 2"
        )
    if zero.get("stage3_module_granularity_threshold"):
        raise ConfigError(
            f"{source}: zero_optimization.stage3_module_granularity_threshold has DeepSpeed give weights "
            "back that the GPU still reads (README.md); take it out: layers are gathered whole without it"
        )
    if config.run.compile:
        # DeepSpeed's own linear layer reads what differs from one to the next, so that torch.compile gives up
        # after eight layers. It lets go of gathered weights until backward, which compiled layers do anyway.
        zero.setdefault("memory_efficient_linear", False)


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
