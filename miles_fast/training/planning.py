"""What a run will take on more GPUs: memory, communication and time, from one measured GPU.

Rings: a GPU sends (n - 1) / n of a buffer for a gather or a scatter of its gradients, twice that for a sum
over all. Between hosts every GPU has its own network card, and a ring is as fast as its slowest link. Every
step takes as long as its slowest rank's; what ranks differ by is known only from a run of several.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from miles_fast.config import Config, ModelConfig
from miles_fast.config_tree import to_dict
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.training.ds_config import EngineSettings
from miles_fast.training.objective import Objective
from miles_fast.training.start import freeze

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bandwidths of one GPU in one direction, in GB/s, and the microseconds of one exchange."""

    gpus_per_host: int = 8
    nvlink: float = 450.0
    network: float = 50.0
    efficiency: float = 0.75
    latency_microseconds: float = 15.0

    def seconds(self, sent_bytes: float, gpus: int, collectives: int = 1) -> float:
        """Time of collectives in which each GPU sends so many bytes in all."""
        if gpus == 1:
            return 0.0
        bandwidth = self.nvlink
        if gpus > self.gpus_per_host:
            # The rings of a host leave it through all of its cards.
            bandwidth = min(bandwidth, self.network * self.gpus_per_host)
        waits = collectives * math.ceil(math.log2(gpus)) * self.latency_microseconds * 1e-6
        return sent_bytes / (bandwidth * self.efficiency * 1e9) + waits


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters that are trained, those that the snapshot holds, and the student's frozen ones."""

    trained: int
    snapshot: int
    frozen: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians of a run: clips/s of all GPUs, seconds of an optimizer step; GiB at the peak, if known."""

    clips_per_second: float
    step_seconds: float
    memory_gib: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one GPU among `gpus`: GiB, bytes sent, their seconds and those of waiting for the slowest rank in a
    step; and clips/s of all. Reading is taken to keep up.
    """

    gpus: int
    state_gib: float
    memory_gib: float | None
    sent_bytes: float
    communication_seconds: float
    waiting_seconds: float
    clips_per_second: float
    efficiency: float


def model_sizes(config: Config, vocabulary_size: int) -> Sizes:
    """Count parameters without allocating them; a text tower given by name is taken to have DistilBERT's.

    Raises ValueError for prefixes of `run.freeze` that no weight has.
    """
    model = _without_files(config.model)
    with torch.device("meta"):
        objective = Objective(
            build_dual_encoder(model, vocabulary_size), config.method, config.data.frames_per_clip
        )
    freeze(objective.model, config.run.freeze)
    followed = [objective.model.video_model, objective.model.vid_proj]
    snapshot = sum(p.numel() for part in followed for p in part.parameters())
    return Sizes(
        trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        snapshot=snapshot if config.method.view != "none" else 0,
        frozen=sum(p.numel() for p in objective.parameters() if not p.requires_grad),
    )


def deciding(config: Config) -> dict[str, Any]:
    """What decides how long a step takes and what it holds, by section."""
    method: dict[str, Any] = {"view": config.method.view}
    if config.method.view == "D":  # whose passes are of what is visible, and of the predictor's size
        whole = to_dict(config.method)
        method |= {"mask": {"ratio": whole["mask"]["ratio"]}, "contrast": {"clip": whole["contrast"]["clip"]}}
        method["predictor"] = whole["predictor"]
    return {
        "model": to_dict(_without_files(config.model)),
        "data": {name: getattr(config.data, name) for name in ("frames_per_clip", "caption_tokens")},
        "method": method,
        "run": {"freeze": sorted(config.run.freeze) or None},  # as in files that are older than it
    }


def _without_files(model: ModelConfig) -> ModelConfig:
    text = dataclasses.replace(model.text, weights=None, tokenizer="counted only")
    return dataclasses.replace(model, text=text, video=dataclasses.replace(model.video, weights=None))


def state_bytes(sizes: Sizes, settings: EngineSettings, gpus: int) -> float:
    """Bytes of weights, gradients, optimizer and snapshot that one GPU of `gpus` holds."""
    shared = [1 if settings.stage < stage else gpus for stage in (1, 2, 3)]
    optimizer, gradients, weights = (sizes.trained / parts for parts in shared)
    if settings.stage == 3 and gpus > 1:  # beside its share those that are gathered
        weights += min(settings.live_parameters, sizes.trained)
    weights += sizes.frozen
    average = 4 * sizes.snapshot / shared[2]
    if not settings.bf16:
        master = 4 * optimizer if settings.stage else 0
        snapshot = 4 * sizes.snapshot + (average if settings.stage == 3 else 0)  # elsewhere they are one
        return 4 * weights + 4 * gradients + master + 8 * optimizer + snapshot
    kept = 6 if _sums_float32(settings) else 2  # beside bf16 gradients their float32 sum
    return 2 * weights + kept * gradients + 12 * optimizer + 2 * sizes.snapshot + average


def sent_bytes(config: Config, sizes: Sizes, settings: EngineSettings, gpus: int) -> tuple[float, float]:
    """Bytes that one GPU sends in an optimizer step: (gradients and weights, contrast and snapshot)."""
    part = (gpus - 1) / gpus
    width = 2 if settings.bf16 else 4
    # At stage 1 float32 sums go to the ranks that update with them: as much as bf16 sums to all.
    micro = settings.accumulation
    times = {0: 2, 1: 3, 2: micro + 1, 3: 3 * micro}[settings.stage]
    state = times * width * sizes.trained
    follow = width * sizes.snapshot if settings.stage == 3 else 0
    return part * state, part * (3 * _rows_bytes(config, settings, gpus) * micro + follow)


def _rows_bytes(config: Config, settings: EngineSettings, gpus: int) -> int:
    """Texts and videos of all ranks, which the contrast takes in float32 (`unit`)."""
    return gpus * settings.batch * 2 * config.model.embedding * 4


def _sums_float32(settings: EngineSettings) -> bool:
    kind = settings.tree.get("data_types", {}).get("grad_accum_dtype")
    return settings.stage == 1 and (kind == "fp32" or not settings.bf16)


def slowest(ranks: int) -> float:
    """Standard deviations by which the slowest of so many ranks is expected above their mean.

    Of normal step times: Blom's approximation (Statistical Estimates and Transformed Beta-Variables, 1958).
    """
    return 0.0 if ranks == 1 else statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def rank_spread(found: Plan, measured: Measured) -> float:
    """Standard deviation of the ranks' step times in seconds, of which `found` knew nothing.

    What `measured`, of as many GPUs, took longer than was predicted is taken for waiting for the slowest.
    """
    predicted = measured.step_seconds * measured.clips_per_second / found.clips_per_second
    return max(measured.step_seconds - predicted, 0.0) / slowest(found.gpus)


def plan(
    config: Config,
    settings: EngineSettings,
    sizes: Sizes,
    measured: Measured,
    links: Links,
    gpus: int,
    hidden: float = 0.0,
    spread: float = 0.0,
) -> Plan:
    """Predict `gpus` GPUs from `measured`, which is of one.

    `hidden` is the share of the reduction of gradients and gathering of weights that the passes hide (0 at
    ZeRO 0 and 1, which reduce after them), `spread` is what `rank_spread` finds.
    """
    alone, state = state_bytes(sizes, settings, 1), state_bytes(sizes, settings, gpus)
    memory = None
    if measured.memory_gib is not None:
        # The contrast keeps all ranks' rows and their gradient.
        rows = 2 * (_rows_bytes(config, settings, gpus) - _rows_bytes(config, settings, 1))
        memory = max(measured.memory_gib - alone / GIB, 0.0) + (state + rows) / GIB
    exchanged, rest = sent_bytes(config, sizes, settings, gpus)
    collectives = 2 + 3 * settings.accumulation
    seconds = links.seconds(exchanged, gpus, collectives) * (1 - hidden) + links.seconds(rest, gpus)
    waiting = spread * slowest(gpus)
    step = measured.step_seconds + seconds + waiting
    clips = settings.batch * settings.accumulation * gpus / step
    return Plan(
        gpus=gpus,
        state_gib=state / GIB,
        memory_gib=memory,
        sent_bytes=exchanged + rest,
        communication_seconds=seconds,
        waiting_seconds=waiting,
        clips_per_second=clips,
        efficiency=clips / (gpus * measured.clips_per_second),
    )
