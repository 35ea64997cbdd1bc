"""Rank, world, rank-0 output, and an all-gather whose gradient is the global one."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("miles_fast")


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def configure_logging() -> None:
    """Send the package's log to stderr from rank 0; other ranks only warn."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)


@functools.cache
def note_once(message: str) -> None:
    """Log one line, once per process: what is missing and what is used instead."""
    logger.info(message)


def start_gather(local_BE: Tensor) -> Callable[[], Tensor]:
    """Start to gather rows: what is called between this and its result runs while they travel.

    The result, called once, gives those of all ranks in rank order, (W * B, E); every rank gives equally
    many. Their gradient is the sum of all ranks' gradients with respect to this rank's rows, so that a loss
    averaged over ranks has the gradient of one process on the joined batch (spec/miles.md 2.4: the official
    code leaves it out).
    """
    if world_size() == 1:
        return lambda: local_BE
    gathered = local_BE.new_empty(world_size() * local_BE.shape[0], *local_BE.shape[1:])
    sent = dist.all_gather_into_tensor(gathered, local_BE.detach().contiguous(), async_op=True)
    return lambda: _Gathered.apply(local_BE, gathered, sent)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local_BE: Tensor, gathered: Tensor, sent: dist.Work) -> Tensor:
        sent.wait()
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()], None, None


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(item: object) -> list[object]:
    """One picklable object of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[object] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items
