"""What the GPU draws and how fast its clock runs while a loop takes batches, as the driver tells."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
from collections.abc import Generator

import torch
from driver import driver_handle

from miles_fast.data.batches import Batch
from miles_fast.data.loader import Loader

SECONDS_BETWEEN_CLOCKS = 0.02


def joules() -> float | None:
    """Energy that the current GPU has used since the driver was loaded; None where nothing tells."""
    handle = driver_handle()
    if handle is None:
        return None
    import pynvml

    torch.cuda.synchronize()
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


class EnergyMeter:
    """Deals a loader's batches; measures from when batch `warmup` is asked for until the last of `count` is.

    What comes behind the last step (a checkpoint, say) is not counted.
    """

    def __init__(self, warmup: int, count: int) -> None:
        self._warmup, self._last = warmup, count - 1
        self.joules_per_batch: float | None = None
        self._clocks: list[int] = []

    @property
    def megahertz(self) -> float | None:
        """Mean clock of the multiprocessors; None where nothing tells."""
        return statistics.fmean(self._clocks) if self._clocks else None

    def deal(self, loader: Loader, first_step: int) -> Generator[Batch, None, None]:
        """The loader's batches."""
        start, ended = None, threading.Event()
        with contextlib.closing(loader.batches(first_step)) as batches, contextlib.ExitStack() as stack:
            stack.callback(ended.set)
            for number in itertools.count():
                if number == self._warmup:
                    start = joules()
                    if start is not None:
                        threading.Thread(target=self._watch_clock, args=(ended,), daemon=True).start()
                if number == self._last and start is not None and number > self._warmup:
                    self.joules_per_batch = (joules() - start) / (number - self._warmup)
                    ended.set()
                yield next(batches)  # held here, a batch would be freed while the next one is waited for

    def _watch_clock(self, ended: threading.Event) -> None:
        import pynvml

        handle = driver_handle()
        while not ended.wait(SECONDS_BETWEEN_CLOCKS):
            self._clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
