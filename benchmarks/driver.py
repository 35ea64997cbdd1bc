"""The GPUs as the driver knows them: by its own numbers, with what every process has taken of them."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

IDLE_GIB = 2  # of an H100 the driver keeps .5 for itself


def driver_handle(gpu: int | None = None) -> Any:
    """Pynvml's handle of torch's GPU `gpu`, the current one if None; None where there is none."""
    if not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    # By its UUID: CUDA_VISIBLE_DEVICES gives torch other numbers than the driver's.
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if gpu is None else gpu)
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")


def numbers_on_host() -> list[str]:
    """The visible GPUs as DeepSpeed's launcher wants them: by their numbers on this host.

    Raises ValueError where CUDA_VISIBLE_DEVICES names them in another way, which the launcher cannot read.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(gpu) for gpu in range(torch.cuda.device_count())]
    numbers = visible.split(",")[: torch.cuda.device_count()]
    if not all(number.strip().isdigit() for number in numbers):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes only numbers; nvidia-smi -L has them"
        )
    return [number.strip() for number in numbers]


def held_by_others(count: int) -> dict[int, float]:
    """GiB in use on those of the first `count` GPUs that are not idle, before this process takes any."""
    used = {}
    for gpu in range(min(count, torch.cuda.device_count())):
        if (handle := driver_handle(gpu)) is not None:
            import pynvml

            used[gpu] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
    return {gpu: gib for gpu, gib in used.items() if gib > IDLE_GIB}
