"""Copies of device tensors in host memory, made while training goes on."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


class HostCopy:
    """Copies of device tensors in one pinned buffer, made on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffer = torch.empty(0)
        self._tensors: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._runs: list[tuple[Tensor, Tensor]] = []  # where to and from, of neighbours at once

    def reserve(self, elements: int) -> None:
        """Have room for so many float32 elements; pinning memory takes seconds, better before training."""
        if self._buffer.numel() < elements:
            self._buffer = torch.empty(elements, pin_memory=self._cuda)

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Start copying contiguous float32 tensors; what is returned is good after `wait`.

        The GPU idles while the host starts the copies: what lies side by side, as views of an optimizer's
        flat buffer do, is one, and the same dict given again must still hold the same tensors.
        """
        if tensors is not self._tensors:
            self._arrange(tensors)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for to, source in self._runs:
                to.copy_(source, non_blocking=True)
        return self._copies

    def _arrange(self, tensors: dict[str, Tensor]) -> None:
        self.reserve(sum(tensor.numel() for tensor in tensors.values()))
        copies, start = {}, 0
        runs: list[tuple[Tensor, int, int]] = []  # the first tensor, and where the copy begins and ends
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            stop = start + tensor.numel()
            copies[name] = self._buffer[start:stop].view(tensor.shape)
            if runs and _follows(tensor, runs[-1][0], start - runs[-1][1]):
                runs[-1] = *runs[-1][:2], stop
            else:
                runs.append((tensor, start, stop))
            start = stop
        self._runs = [(self._buffer[a:b], first.as_strided((b - a,), (1,))) for first, a, b in runs]
        self._tensors, self._copies = tensors, copies

    def hold_back_updates(self) -> None:
        """Have what the device is given from now on wait for the copies; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        """Wait for the copies."""
        if self._stream is not None:
            self._stream.synchronize()


def _follows(tensor: Tensor, first: Tensor, elements: int) -> bool:
    """Whether it lies so many elements behind the first one, in one storage."""
    same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    return same and tensor.storage_offset() == first.storage_offset() + elements
