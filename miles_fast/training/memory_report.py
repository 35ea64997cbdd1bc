"""What the memory of a GPU went to, for a run that has run out of it."""

from __future__ import annotations

from typing import Any

import torch

from miles_fast.distributed import rank
from miles_fast.training.engine import EngineSettings
from miles_fast.training.engine_state import own_state
from miles_fast.training.snapshot import Snapshot


class OutOfMemory(ValueError):
    """A device's memory did not suffice; the message says what took it and which setting to lower."""


def memory_report(
    engine: Any, snapshot: Snapshot | None, settings: EngineSettings, device: torch.device
) -> str:
    """A table of GiB by use, and what to change, in the order of what it costs."""
    state = own_state(engine)
    rows = {
        "weights (computing)": _bytes([p.data for p in engine.module.parameters()]),
        "float32 weights": _bytes([t for name, t in state.items() if name.startswith("weight|")]),
        "optimizer moments": _bytes([t for name, t in state.items() if not name.startswith("weight|")]),
        "gradients": _bytes([p.grad for p in engine.module.parameters() if p.grad is not None]),
        "snapshot's average": _bytes(list(snapshot.state_dict().values())) if snapshot is not None else 0,
    }
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        peak = stats["allocated_bytes.all.peak"]
        rows["activations and the rest, at the peak"] = max(peak - sum(rows.values()), 0)
        rows["allocated at the peak"] = peak
        rows["reserved by torch"] = stats["reserved_bytes.all.current"]
        rows["on the device"] = torch.cuda.get_device_properties(device).total_memory
    table = "\n".join(f"  {name:<40}{size / 2**30:>9.2f} GiB" for name, size in rows.items())
    half = max(settings.batch // 2, 1)
    advice = [
        f"train_micro_batch_size_per_gpu {settings.batch} -> {half} with gradient_accumulation_steps "
        f"{settings.accumulation} -> {settings.accumulation * 2} in DeepSpeed's json"
    ]
    if settings.stage < 3:
        advice.append(f"zero_optimization.stage {settings.stage} -> {settings.stage + 1} (with several GPUs)")
    advice.append("run.activation_memory_budget, with run.compile: true (0.3, say: recomputes the rest)")
    advice.append("data.frames_per_clip, or method.view = D, which drops the masked patches")
    return f"rank {rank()} ran out of memory.\n{table}\nLower, in this order:\n  " + "\n  ".join(advice)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
