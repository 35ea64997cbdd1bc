"""What a run is told of a GPU's memory: what it went to when it has run out, and that it is all but full."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from miles_fast.distributed import logger, rank
from miles_fast.training.ds_config import EngineSettings
from miles_fast.training.engine_state import own_state
from miles_fast.training.snapshot import Snapshot

# What torch, NCCL, Triton, quack, cuBLAS and DALI say: only torch has a type for it. Where torch holds
# almost all memory, the others are the first to find none.
_SAID = re.compile(
    r"[Oo]ut of memory|OUT_OF_MEMORY|cudaErrorMemoryAllocation|Failed to CUDA [a-z]*alloc|STATUS_ALLOC_FAILED"
    r"|CUDA allocation failed|device allocator failed|Can't allocate \d+ bytes on device"
)
# What they say of other faults, too: cuBLAS where a handle has no room, cuDNN where its kernels have none.
_SAID_WHEN_FULL = re.compile("CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_(INTERNAL_ERROR|EXECUTION_FAILED)")
_FULL = 2**30  # bytes that are free: cuDNN's libraries take up to half of it (pytorch/pytorch#81620)

_OTHERS = re.compile(r"\bProcess (\d+) has ([\d.]+ [KMG]iB) memory in use")  # torch's, of every other one

_FEW_LIVE = 10**8  # gathered weights: four layers of a ViT-H


class OutOfMemory(ValueError):
    """A device's memory did not suffice; the message says what took it and which setting to lower."""


def memory_error(error: BaseException | None) -> BaseException | None:
    """The error that says that memory did not suffice: this one, or one that it only followed from.

    As at the end of a graph's capture that broke off.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or _SAID.search(str(error)):
            return error
        if _SAID_WHEN_FULL.search(str(error)) and _gpu_is_full():
            return error
        error = error.__context__
    return None


def _gpu_is_full() -> bool:
    try:
        return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _FULL
    except RuntimeError:  # a GPU that answers nothing any more has failed otherwise
        return False


def memory_report(
    error: BaseException,
    objective: nn.Module | None,
    engine: Any,
    snapshot: Snapshot | None,
    settings: EngineSettings,
    device: torch.device,
) -> str:
    """What `error` says, a table of GiB by use, and what to change, in the order of what it costs.

    What the run had not built when its memory ended is None.
    """

    def held(tensors: Iterable[Tensor | None]) -> int:
        there = [tensor for tensor in tensors if tensor is not None and tensor.device.type == device.type]
        return sum(tensor.numel() * tensor.element_size() for tensor in there)

    weights = list(objective.parameters()) if objective is not None else []
    state = own_state(engine) if engine is not None else {}
    rows = {
        "weights (computing)": held(weight.data for weight in weights),
        "float32 weights": held(t for name, t in state.items() if name.startswith("weight|")),
        "optimizer moments": held(t for name, t in state.items() if not name.startswith("weight|")),
        "gradients": held(weight.grad for weight in weights),
        "snapshot's average": held(snapshot.state_dict().values()) if snapshot is not None else 0,
    }
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        peak = stats["allocated_bytes.all.peak"]
        rows["activations and the rest, at the peak"] = max(peak - sum(rows.values()), 0)
        rows["allocated at the peak"] = peak
        rows["reserved by torch"] = stats["reserved_bytes.all.current"]
        rows["on the device"] = torch.cuda.get_device_properties(device).total_memory
    table = "\n".join(f"  {name:<40}{size / 2**30:>9.2f} GiB" for name, size in rows.items())
    advice = [
        f"what others hold of this GPU: process {process} has {size} of it"
        for process, size in _OTHERS.findall(str(error))
    ]
    if settings.batch > 1:
        advice.append(
            f"train_micro_batch_size_per_gpu {settings.batch} -> {settings.batch // 2} with "
            f"gradient_accumulation_steps {settings.accumulation} -> {settings.accumulation * 2} in "
            "DeepSpeed's json"
        )
    if settings.stage < 3:
        advice.append(f"zero_optimization.stage {settings.stage} -> {settings.stage + 1} (with several GPUs)")
    elif settings.live_parameters > _FEW_LIVE:
        advice.append(
            f"zero_optimization.stage3_max_live_parameters {settings.live_parameters} -> {_FEW_LIVE}, and as "
            "much for stage3_max_reuse_distance (weights are gathered again for backward, which takes time)"
        )
    advice.append("run.activation_memory_budget, with run.compile: true (0.3, say: recomputes the rest)")
    advice.append("data.frames_per_clip, or method.view = D, which drops the masked patches")
    cause = textwrap.shorten(str(error), 300)
    lines = (f"rank {rank()} ran out of memory.", cause, table, "Lower, in this order:")
    return "\n".join(lines) + "\n  " + "\n  ".join(advice)


def warn_of_full_memory(retries: int) -> None:
    """Of the log's `allocation_retries` since its last record: a run may be slow for them and not fail."""
    if retries:
        logger.warning(
            "GPU memory is all but full: torch emptied its cache %d times since the last record, and the GPU "
            "waited for it. A smaller train_micro_batch_size_per_gpu may be faster; so may "
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment",
            retries,
        )
