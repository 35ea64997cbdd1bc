"""How layers are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._functorch import config as partitioning


def inductor_within(memory_budget: float) -> str | Callable:
    """torch.compile's default backend, keeping no more than a share of what backward needs.

    For graphs without random numbers: below 1, torch draws those anew in backward and with them wrong
    gradients (https://github.com/pytorch/pytorch/issues/190758), so that dropout must stay outside.
    """
    if memory_budget == 1.0:
        return "inductor"

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        with partitioning.patch(activation_memory_budget=memory_budget):
            return compile_fx(graph, inputs)

    return backend


# A layer has a graph for each of: last or not, student or snapshot, frozen or behind what is, and the
# predictor's. Beyond this many torch would run it uncompiled.
_GRAPHS = 32


def compile_each(layers: Iterable[nn.Module], memory_budget: float = 1.0) -> None:
    """Have layers compiled when they first run, anew for each shape; those alike share one compilation."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    backend = inductor_within(memory_budget)
    for layer in layers:
        layer.compile(dynamic=False, backend=backend)
