"""Results on their way from the device to the host, without waiting for it at every batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Along = TypeVar("Along")
AHEAD = 2  # results being computed while the host prepares the next


def on_host(found: Iterable[tuple[Along, Tensor]]) -> Iterator[tuple[Along, Tensor]]:
    """Each tensor on the CPU, with what came along with it, in order.

    From a GPU a copy is queued behind the work that makes the tensor, and waited for when `AHEAD` later ones
    are queued: the device computes while the host is elsewhere.
    """
    coming: deque[tuple[Along, Tensor, torch.cuda.Event | None]] = deque()
    for along, tensor in found:
        coming.append((along, *_start_copy(tensor)))
        if len(coming) > (AHEAD if tensor.is_cuda else 0):
            yield _arrived(*coming.popleft())
    while coming:
        yield _arrived(*coming.popleft())


def _start_copy(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not tensor.is_cuda:
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return copy, done


def _arrived(along: Along, copy: Tensor, done: torch.cuda.Event | None) -> tuple[Along, Tensor]:
    if done is not None:
        done.synchronize()
    return along, copy
