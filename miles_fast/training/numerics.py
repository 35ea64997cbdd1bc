"""Loud numerics: steps skipped on all ranks, spikes, rollback, updates that change nothing, collapse.

A loss that is not finite, or is a spike, becomes a gradient that is not finite on its rank. Reducing the
gradients carries that to all ranks, and DeepSpeed, which looks at the norm before it updates, skips the
update and the schedule's step everywhere. The host reads nothing of the device beyond that one norm.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from miles_fast.config import RunConfig
from miles_fast.distributed import gather_objects, logger, rank, sum_over_ranks
from miles_fast.training.engine_state import pieces
from miles_fast.training.objective import Losses

WINDOW = 128  # losses of which the running median is taken
FEWEST = 16  # before so many there is no median to speak of
SAMPLED = 1 << 16  # weights of a rank that are compared before and after an update
WATCHED = 16  # tensors of which they are taken, each of which costs a launch a step


class NumericsError(ValueError):
    """Training that has gone wrong in its numbers and does not recover; the message says what was seen."""


class LossGuard:
    """Watches the losses of an optimizer step's micro steps."""

    def __init__(self, spike_factor: float | None, device: torch.device) -> None:
        self._factor = spike_factor
        self._recent = torch.full((WINDOW,), math.nan, device=device)
        self.count = 0  # of the losses that the window has seen
        self._step: list[tuple[Tensor, Tensor, Tensor, tuple[str, ...]]] = []

    @property
    def window(self) -> Tensor | None:
        """The losses that a spike is judged by, always the same tensor; None where none are watched for."""
        return self._recent if self._factor is not None else None

    def restore(self, window: Tensor, count: int) -> None:
        """Go on with the window and the count of an earlier guard."""
        self._recent.copy_(window)
        self.count = count

    def begin(self) -> None:
        """A new optimizer step begins."""
        self._step.clear()

    def check(self, losses: Losses, keys: tuple[str, ...]) -> Tensor:
        """The loss to go backward from: itself where it is fine, else one whose gradient is not finite."""
        loss = losses.total
        seen = loss.detach().float()
        factor = seen * 0 + 1  # exactly 1, or NaN
        if self._factor is not None:
            median = self._recent.nanmedian()
            if self.count >= FEWEST:
                factor = torch.where(seen > self._factor * median, math.nan, factor)
            # A spike must not raise the bar for the next one.
            self._recent[self.count % WINDOW] = torch.where(factor.isfinite(), seen, median)
            self.count += 1
        self._step.append((seen, factor, losses.regression, keys))
        return loss * factor.to(loss.dtype)

    def blame(self) -> list[dict[str, Any]]:
        """Losses and sample keys of the ranks' micro steps that made the step be skipped.

        All ranks must call it. Embeddings of one rank reach every rank's contrast: where a regression, which
        is a rank's own, is not finite, those ranks are meant. Where every loss was fine, the gradients were
        not, and all are listed.
        """
        own = [
            {
                "rank": rank(),
                "loss": loss.item(),
                "fine": bool(factor.isfinite()),
                "own fine": bool(regression.isfinite()),
                "keys": list(keys),
            }
            for loss, factor, regression, keys in self._step
        ]
        every = [entry for entries in gather_objects(own) for entry in entries]
        for sign in ("own fine", "fine"):
            if not all(entry[sign] for entry in every):
                every = [entry for entry in every if not entry[sign]]
                break
        return [{name: entry[name] for name in ("rank", "loss", "keys")} for entry in every]


class SkippedData:
    """Data that a run leaves out, and how many steps in a row were skipped; the same on all ranks.

    Data are counted in optimizer steps' worth from 0, as the loader does.
    """

    def __init__(self, config: RunConfig, ranges: list[tuple[int, int]]) -> None:
        self.ranges = sorted((int(first), int(stop)) for first, stop in ranges)
        self.total = 0
        self._config, self._row, self._rollbacks = config, deque[int](), 0

    def position(self, steps: int) -> int:
        """The data that the step after `steps` steps takes."""
        for first, stop in self.ranges:
            if first <= steps:
                steps += stop - first
        return steps

    def applied(self) -> None:
        """A step changed the weights."""
        self._row.clear()

    def saved(self) -> None:
        """A checkpoint was begun after steps that were applied."""
        if not self._row:
            self._rollbacks = 0

    def skipped(self, data: int) -> bool:
        """A step on these data was skipped. True: it is time to roll back, and to `leave_out` their data.

        Raises NumericsError when the run rolled back too often already.
        """
        self.total += 1
        self._row.append(data)
        if len(self._row) < self._config.max_skipped_steps:
            return False
        if self._rollbacks >= self._config.max_rollbacks:
            raise NumericsError(
                f"{len(self._row)} steps in a row were skipped after {self._rollbacks} rollbacks "
                "(run.max_rollbacks) without a checkpoint in between: lower the learning rate, look at the "
                "samples that log.jsonl names, or resume from an older checkpoint"
            )
        self._rollbacks += 1
        return True

    def leave_out(self, step: int) -> None:
        """Leave out the data of the steps skipped in a row, those behind `step`, which was gone back to."""
        first = max(self._row[0], self.position(step))
        self.ranges = _joined([*self.ranges, (first, self._row[-1] + 1)])
        self._row.clear()


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((first, stop))
    return joined


class UpdateCheck:
    """Compares some of the float32 weights before and after every update that DeepSpeed reports as applied.

    Of bf16 training these are the weights that the optimizer updates: a rate too small to show in bf16 is no
    error. Compared on the device; `verify` reads what was found.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        trained = {name for name, weight in engine.module.named_parameters() if weight.requires_grad}
        flats = {id(p.flat): p.flat.detach().view(-1) for p in pieces(engine) if p.name in trained}
        # ZeRO 0 has one for each parameter: some will do.
        flat = sorted(flats.values(), key=len, reverse=True)[:WATCHED]
        stride = max(1, sum(map(len, flat)) // SAMPLED)
        nothing = torch.empty(0, device=flat[0].device if flat else engine.device)
        self._watched = [*(tensor[::stride] for tensor in flat), nothing]
        self._old = torch.cat(self._watched)
        self._steps: list[tuple[int, float]] = []
        self._changed: list[Tensor] = []

    def before(self) -> None:
        """Note the rate of the update to come, which the schedule's step replaces."""
        self._rate = max(group["lr"] for group in self._engine.optimizer.param_groups)

    def after(self, step: int) -> None:
        """Compare with the weights after the last update; the host does not wait."""
        new = torch.cat(self._watched)
        if self._rate > 0:
            self._steps.append((step, self._rate))
            self._changed.append((new != self._old).any())
        self._old = new

    def verify(self) -> None:
        """Raise NumericsError on all ranks, which must call it, where one of the updates was lost."""
        if not self._steps:
            return
        changed = sum_over_ranks(torch.stack(self._changed).float().to(self._engine.device)).tolist()
        for (step, rate), ranks in zip(self._steps, changed, strict=True):
            if not ranks:
                raise NumericsError(
                    f"step {step} changed none of the sampled weights, although DeepSpeed reports it as "
                    f"applied at a learning rate of {rate:.3g}: it was lost, as in DeepSpeed's issue 8415"
                )
        self._steps.clear()
        self._changed.clear()


def warn_of_collapse(std: float, config: RunConfig) -> None:
    """Say when the targets of the regression have become alike."""
    if std < config.min_target_std:
        logger.warning(
            "the targets collapse: their standard deviation is %.3g, below run.min_target_std = %g. Raise "
            "method.snapshot.momentum, or lower the learning rate",
            std,
            config.min_target_std,
        )
