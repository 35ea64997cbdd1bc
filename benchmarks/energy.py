"""What the GPU draws while a loop takes batches, from the driver's own counter."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
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
    # By its UUID: CUDA_VISIBLE_DEVICES gives torch other numbers than the driver's.
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


class EnergyMeter:
    """Deals a loader's batches; reads the counter when batch `warmup` and the last of `count` are asked for.

    What comes behind the last step (a checkpoint, say) is not counted.
    """

    def __init__(self, warmup: int, count: int) -> None:
        self._warmup, self._last = warmup, count - 1
        self.joules_per_batch: float | None = None

    def deal(self, loader: Loader, first_step: int) -> Generator[Batch, None, None]:
        """The loader's batches."""
        start = None
        with contextlib.closing(loader.batches(first_step)) as batches:
            for number in itertools.count():
                if number == self._warmup:
                    start = joules()
                if number == self._last and start is not None:
                    self.joules_per_batch = (joules() - start) / (number - self._warmup)
                yield next(batches)  # held here, a batch would be freed while the next one is waited for
