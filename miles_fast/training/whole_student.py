"""The student for passes that the engine does not run, such as evaluation, at any ZeRO stage."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.training.averages import twelfths


class WholeStudent:
    """Made before DeepSpeed partitions the student.

    At ZeRO-3 such passes run a copy, gathered when it is asked for: DeepSpeed gathers layer by layer with all
    ranks, and a rank with more clips would wait for ever for those with fewer.
    """

    def __init__(self, student: DualEncoder, stage: int) -> None:
        self._student, self._empty = student, None
        if stage == 3:
            weights = {
                id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                for p in student.parameters()
            }
            self._empty = copy.deepcopy(student, weights)

    @torch.no_grad()
    def gather(self) -> DualEncoder:
        """The student with its present weights; all ranks must call it."""
        if self._empty is None:
            return self._student
        whole = copy.deepcopy(self._empty)
        names, weights = zip(*self._student.named_parameters(), strict=True)
        found = (p.detach().clone() for part in _gathered(list(weights)) for p in part)
        state = dict(zip(names, found, strict=True)) | dict(self._student.named_buffers())
        whole.load_state_dict({name: state[name] for name in whole.state_dict()}, assign=True)
        return whole.to(next(iter(state.values())).device)


def _gathered(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those of ZeRO 3, some at a time whole."""
    import deepspeed

    for place in twelfths(len(weights)):
        with deepspeed.zero.GatheredParameters(weights[place]):
            yield weights[place]
