"""A step as configured beside other ways to run it: what people would otherwise have, and single losses.

What no key and no op's dispatch decides cannot be switched off, and is in every row: flat gradients, the
student's passes of view B in one batch, the last block's rows alone, the texts beside the videos in a CUDA
graph, a host that waits for the GPU in DeepSpeed's norm only.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from energy import EnergyMeter
from loader_stages import WARMUP

from miles_fast.config import Config
from miles_fast.config_tree import load_config
from miles_fast.distributed import logger
from miles_fast.models.flops import training_flops
from miles_fast.training.ds_config import EngineSettings, check_ds_config
from miles_fast.training.loop import pretrain
from miles_fast.training.memory_report import memory_error
from miles_fast.training.progress import read_log
from miles_fast.training.signals import Stopped


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A change of the configured run: overrides, entries of DeepSpeed's json, names of ops in plain torch."""

    name: str
    overrides: tuple[str, ...] = ()
    ds: dict[str, Any] = field(default_factory=dict)
    plain_ops: tuple[str, ...] = ()


# mlp decides for biased_gelu too, and where it is not fp8 for linear_gelu; linear_gelu and linear for fp8.
PLAIN_OPS = (
    *("token_gather", "feature_regression", "residual_norm"),
    *("linear", "linear_gelu", "mlp"),
)
_EAGER = (
    "run.compile=false",
    "run.cuda_graphs=false",
    "run.activation_memory_budget=1",
    "run.precision=null",
)
_IN_BF16 = {"bf16": {"enabled": True}}  # what `auto` is on a GPU only
CONFIGURED = Variant(name="as configured")
BASELINES = (
    Variant(name="eager, SDPA", overrides=(*_EAGER, "model.attention=sdpa"), plain_ops=PLAIN_OPS),
    Variant(
        name="as published, bf16",
        overrides=(*_EAGER, "model.attention=eager"),
        ds=_IN_BF16,
        plain_ops=PLAIN_OPS,
    ),
    Variant(
        name="as published, fp32",
        overrides=(*_EAGER, "model.attention=eager"),
        ds={"bf16": {"enabled": False}},
        plain_ops=PLAIN_OPS,
    ),
)
BF16 = Variant(name="bf16 linear layers", overrides=("run.precision=null",), ds=_IN_BF16)
FP8 = Variant(name="fp8 linear layers", overrides=("run.precision=fp8",), ds=_IN_BF16)
ABLATIONS = (
    Variant(name="no torch.compile", overrides=("run.compile=false", "run.activation_memory_budget=1")),
    BF16,
    Variant(name="no CUDA graphs", overrides=("run.cuda_graphs=false",)),
    Variant(name="SDPA for the attention ops", overrides=("model.attention=sdpa",)),
    Variant(name="token gather in plain torch", plain_ops=("token_gather",)),
    Variant(name="feature regression in plain torch", plain_ops=("feature_regression",)),
    Variant(name="LayerNorm's gradient in plain torch", plain_ops=("residual_norm",)),
    Variant(name="MLP by cuBLAS, GELU behind", plain_ops=("linear_gelu", "mlp")),
    Variant(name="linear layers by cuBLAS", plain_ops=("linear",)),
    Variant(name="unfused AdamW", ds={"optimizer": {"params": {"fused": False}}}),
    Variant(name="gradients summed in DeepSpeed's default dtype", ds={"data_types": {}}),
    Variant(name="JPEGs decoded by nvJPEG", overrides=("data.jpeg_decoder=nvjpeg",)),
    Variant(name="one reading process", overrides=("data.decode_workers=1",)),
)


def ablations(config_file: str, overrides: Sequence[str]) -> list[Variant]:
    """Those of ABLATIONS that change something of this config."""
    configured = load_config(config_file, overrides)
    return [
        one
        for one in ABLATIONS
        if not one.overrides or load_config(config_file, [*overrides, *one.overrides]) != configured
    ]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The run that variants change: its config file and overrides, DeepSpeed's json, the number of steps."""

    config_file: str
    overrides: Sequence[str]
    ds_tree: dict[str, Any]
    steps: int

    def configs(self, variant: Variant, *more: str) -> tuple[Config, EngineSettings]:
        """The variant's, checked. Raises ConfigError where it cannot be run."""
        overrides = [*self.overrides, *variant.overrides, f"run.steps={self.steps}", *more]
        config, tree = load_config(self.config_file, overrides), _merged(self.ds_tree, variant.ds)
        cuda = torch.cuda.is_available()
        return config, check_ds_config(tree, "ds config", config, cuda=cuda, ranks=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over a run's log after the warm-up; what this machine cannot tell is None.

    `batch` is smaller than configured where that did not fit the GPU's memory. `start_seconds` are those from
    the process' start to the end of its first step, `start_phases` their parts: of what was measured first in
    a process.
    """

    name: str
    batch: int
    clips_per_second: float
    step_milliseconds: float
    data_wait_milliseconds: float
    tflops_per_second: float
    mfu: float | None
    memory_gib: float | None
    joules_per_clip: float | None
    megahertz: float | None
    start_seconds: float | None
    start_phases: dict[str, float] | None


_MOST_KEPT_GIB = 4  # behind a run; rows count what the ones before them left


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A variant that did not run, at the smallest batch that was tried."""

    name: str
    batch: int
    error: str


def measure_variants(
    variants: Sequence[Variant], experiment: Experiment, *, fresh: bool = False
) -> list[Row | Failure]:
    """Train each variant, one after the other in this process; one that fails is named.

    `fresh`: nothing has been measured in this process before.
    """
    return [
        _measure_fitting(variant, experiment, fresh=fresh and not number)
        for number, variant in enumerate(variants)
    ]


def _measure_fitting(variant: Variant, experiment: Experiment, *, fresh: bool) -> Row | Failure:
    """The row at the configured batch, or at the first half, quarter, ... of it that fits the memory."""
    experiment = replace(experiment, ds_tree=copy.deepcopy(experiment.ds_tree))
    while True:
        batch = experiment.ds_tree["train_micro_batch_size_per_gpu"]
        try:
            return _measure(variant, experiment, fresh=fresh)
        except Stopped:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if batch == 1 or memory_error(error) is None:
                logger.error("%s, batch %d", variant.name, batch, exc_info=True)
                return Failure(name=variant.name, batch=batch, error=said)
        # Behind the except clause, whose traceback holds the step's tensors.
        if (kept := _free_memory()) > _MOST_KEPT_GIB:
            said += f"\nA capture that broke off keeps {kept:.0f} GiB: measure a smaller batch by itself"
            return Failure(name=variant.name, batch=batch, error=said)
        experiment.ds_tree["train_micro_batch_size_per_gpu"], fresh = batch // 2, False


def _free_memory() -> float:
    """Give back what nothing uses; GiB that torch keeps on the GPU all the same."""
    gc.collect()
    gc.collect()  # what the first let go of: weights, on which DeepSpeed hangs methods that hold them
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**30


def _measure(variant: Variant, experiment: Experiment, *, fresh: bool) -> Row:
    records, meter = train_variant(variant, experiment, log_every=5)
    start = {name: records[0].get(name) if fresh else None for name in ("start_seconds", "start_phases")}
    records = [record for record in records if record["step"] > WARMUP]
    names = ("clips_per_second", "step_milliseconds", "data_wait_milliseconds", "mfu", "memory_gib")
    medians = {
        name: statistics.median(r[name] for r in records) if name in records[0] else None for name in names
    }
    config, _ = experiment.configs(variant)
    data = config.data
    flops = training_flops(config.model, config.method, data.frames_per_clip, data.caption_tokens)
    batch = experiment.ds_tree["train_micro_batch_size_per_gpu"]
    return Row(
        name=variant.name,
        tflops_per_second=medians["clips_per_second"] * flops / 1e12,
        batch=batch,
        joules_per_clip=None if meter.joules_per_batch is None else meter.joules_per_batch / batch,
        megahertz=meter.megahertz,
        **start,
        **medians,
    )


def train_variant(
    variant: Variant, experiment: Experiment, *, log_every: int
) -> tuple[list[dict[str, Any]], EnergyMeter]:
    """Records of a training run's log, and what the driver told behind the warm-up."""
    torch._dynamo.reset()
    _free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, ops(plain=variant.plain_ops):
        run = (f"run.folder={folder}/run", f"run.log_every={log_every}")
        config, settings = experiment.configs(variant, *run)
        meter = EnergyMeter(WARMUP * settings.accumulation, experiment.steps * settings.accumulation)
        pretrain(config, settings, deal=meter.deal)
        records = [record for record in read_log(Path(config.run.folder)) if "loss" in record]
    return records, meter


@contextlib.contextmanager
def ops(*, plain: Sequence[str]) -> Iterator[None]:
    """Those named, of PLAIN_OPS, run their plain-torch definitions; attention is the config's."""
    with contextlib.ExitStack() as stack:
        for op in plain:
            # A Mock would keep the tensors of every call.
            decides = "has_quack" if op == "linear" else "runs_triton"
            stack.enter_context(mock.patch(f"miles_fast.kernels.{op}.{decides}", lambda *_: False))
        yield


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(tree)
    for key, value in changes.items():
        nested = isinstance(value, dict) and value and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def table(rows: Sequence[Row | Failure]) -> str:
    """The rows for people, each with its speed against the first that ran."""
    first = next((row for row in rows if isinstance(row, Row)), None)
    speeds = ("clips/s", "of first", "ms", "data ms", "TFLOP/s", "MFU %")
    columns = ("batch", *speeds, "GiB", "J/clip", "MHz", "start s")
    lines = [f"{'':<46}" + "".join(f"{column:>10}" for column in columns)]
    for row in rows:
        if isinstance(row, Failure):
            lines.append(f"{row.name:<46}{row.batch:>10}  failed: {row.error.splitlines()[0]}")
            continue
        shown = (
            row.batch,
            row.clips_per_second,
            row.clips_per_second / first.clips_per_second,
            row.step_milliseconds,
            row.data_wait_milliseconds,
            row.tflops_per_second,
            None if row.mfu is None else 100 * row.mfu,
            row.memory_gib,
            row.joules_per_clip,
            row.megahertz,
            row.start_seconds,
        )
        lines.append(f"{row.name:<46}" + "".join(map(_cell, shown)))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>10}"
    return f"{value:>10}" if isinstance(value, int) else f"{value:>10.2f}"
