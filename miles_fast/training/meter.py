"""What a run's log says of its speed and its losses."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from miles_fast.config import Config
from miles_fast.data.batches import Quarantine
from miles_fast.data.order import Share
from miles_fast.distributed import sum_over_ranks, world_size
from miles_fast.models.flops import peak_flops, training_flops
from miles_fast.training.objective import Losses


class Meter:
    """Times steps between two log records; device values are read only when a record is made.

    `mfu` is the share of the GPU's bf16 peak, of `run.precision: fp8` too.
    """

    def __init__(self, config: Config, share: Share, device: torch.device) -> None:
        self._clips_per_step, self._device = share.global_batch, device
        self._flops = training_flops(
            config.model, config.method, config.data.frames_per_clip, config.data.caption_tokens
        )
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name)
        self._retries = 0
        self.pause()

    def pause(self) -> None:
        """Start timing anew, after something that is not training."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def waited(self, seconds: float) -> None:
        """The training thread waited this long for data."""
        self._waited += seconds

    def stepped(self) -> None:
        """One optimizer step is issued."""
        self._steps += 1

    def record(
        self, losses: Losses, norm: Tensor | None, engine: Any, quarantine: Quarantine
    ) -> dict[str, Any]:
        """Figures since the last record; the one place of the loop that waits for the device."""
        values = torch.stack([value.detach().float() for value in losses])
        values = torch.cat([values / world_size(), values.new_tensor([self._new_retries()])])
        loss, contrastive, regression, cosine, std, retries = sum_over_ranks(values).tolist()
        seconds, steps = max(time.perf_counter() - self._start, 1e-9), max(self._steps, 1)
        clips = self._clips_per_step * self._steps / seconds
        norm = engine.get_global_grad_norm() if norm is None else norm
        record = {
            "loss": loss,
            "contrastive": contrastive,
            "regression": regression,
            "target_cosine": cosine,
            "target_std": std,
            "learning_rate": engine.get_lr()[0],
            "clips_per_second": clips,
            "step_milliseconds": 1000 * seconds / steps,
            "data_wait_milliseconds": 1000 * self._waited / steps,
            "gradient_norm": float(norm),
            "bad_samples": dict(quarantine.counts),
        }
        if self._device.type == "cuda":
            record["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            record["allocation_retries"] = int(retries)
        if self._peak:
            record["mfu"] = clips * self._flops / (self._peak * world_size())
        self.pause()
        return record

    def _new_retries(self) -> int:
        """How often torch found no memory here since the last record, until it had emptied its cache."""
        if self._device.type != "cuda":
            return 0
        before, self._retries = self._retries, torch.cuda.memory_stats(self._device)["num_alloc_retries"]
        return self._retries - before
