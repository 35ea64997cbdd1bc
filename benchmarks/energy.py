"""What the GPU draws while a loop takes batches, from the driver's own counter."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator

import torch

from miles_fast.data.batches import Batch
from miles_fast.data.loader import Loader


def joules() -> float | None:
    """Energy that the current GPU has used since the driver was loaded; None where nothing tells."""
    if not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    torch.cuda.synchronize()
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


class EnergyMeter:
    """Deals a loader's batches and reads the counter after `warmup` of them and after the last."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self.joules_per_batch: float | None = None

    def deal(self, loader: Loader, first_step: int) -> Generator[Batch, None, None]:
        """The loader's batches."""
        start, count = None, 0
        try:
            for batch in loader.batches(first_step):
                if count == self._warmup:
                    start = joules()
                count += 1
                yield batch
        finally:
            if start is not None:
                self.joules_per_batch = (joules() - start) / (count - self._warmup)
