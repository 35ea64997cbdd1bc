"""The snapshot: a slowly following copy of the student's video encoder; it supplies the targets."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from miles_fast.config import RegressionConfig, SnapshotConfig
from miles_fast.distributed import rank, world_size
from miles_fast.models.dual_encoder import DualEncoder


class Snapshot:
    """Video encoder and projection, averaged in float32, never in optimizer or export.

    Made from the student before DeepSpeed partitions it. `dtype` is what the encoder computes in; the average
    stays float32, since at a momentum of 0.9995 one step moves a weight by less than half of bf16's spacing.
    Every rank holds all of both, or with `sharded` its own parts of an average that is not what computes: it
    sends them to the others in `dtype`, and all ranks must call `follow`.
    """

    def __init__(
        self,
        student: DualEncoder,
        config: SnapshotConfig,
        regression: RegressionConfig,
        *,
        total_steps: int,
        dtype: torch.dtype,
        device: torch.device,
        sharded: bool = False,
    ) -> None:
        self.config, self.regression, self.total_steps = config, regression, total_steps
        parts = nn.ModuleDict({"video_model": student.video_model, "vid_proj": student.vid_proj})
        self._modules = copy.deepcopy(parts).requires_grad_(False).eval().to(device=device, dtype=dtype)
        self._names = [name for name, _ in parts.named_parameters()]
        self._used = list(self._modules.parameters())
        self._average: list[Tensor | None] = list(self._used)
        self._wide: list[Tensor] = []
        self.sharded = sharded and dtype != torch.float32 and world_size() > 1
        self._sent: list[Tensor] = []
        if dtype != torch.float32:
            weights, places = list(parts.parameters()), _parts(len(self._used))
            self._wide = _in_one_buffer(weights, places, device)
            for number, place in enumerate(places):
                own = [p.detach().float().to(device, copy=True) for p in weights[place]]
                self._average[place] = own if self._holds(number) else [None] * len(own)
            if self.sharded:
                self._sent = [_joined(self._used[place]) for place in places]
        self._student: DualEncoder | None = None
        self._followed: list[nn.Parameter] = []

    @property
    def video_model(self) -> nn.Module:
        """The encoder that `encode` runs."""
        return self._modules["video_model"]

    @torch.no_grad()
    def encode(self, video_BTCHW: Tensor, masked_BM: Tensor) -> Tensor:
        """Targets of the unmasked clips at patches counted from 0: (B, M, D), or (B, M, E) projected."""
        tokens = self.video_model(video_BTCHW, rows_BM=masked_BM + 1)
        return self._modules["vid_proj"](tokens) if self.regression.feature == "projected" else tokens

    def momentum(self, step: int) -> float:
        """Weight of the old average at optimizer step `step` (1-based): a cosine between the two."""
        first, final = self.config.momentum, self.config.final_momentum
        return final - (final - first) * (math.cos(math.pi * step / self.total_steps) + 1) / 2

    @torch.no_grad()
    def follow(self, student: DualEncoder, step: int, *, moved: bool = True) -> None:
        """Move towards the student after optimizer step `step` (1-based), as `config.update` says.

        Where a skipped step has not `moved` the student there is nothing to average; a copy that is due is
        one of the student as it was, and is not put off by a whole period.
        """
        if self.config.update == "frozen" or not (moved or self.config.update == "copy"):
            return
        if self.config.update == "copy" and step % self.config.every:
            return
        weight = 1.0 if self.config.update == "copy" else 1 - self.momentum(step)
        # Looking for them takes the host milliseconds, for which a GPU waits.
        if student is not self._student:
            parts = nn.ModuleDict({"video_model": student.video_model, "vid_proj": student.vid_proj})
            self._student, self._followed = student, list(parts.parameters())
            assert len(self._followed) == len(self._average)
        for number, (place, parameters) in enumerate(gathered_parts(self._followed)):
            average, wide = self._average[place], self._wide[place]
            if self._holds(number):
                if wide:
                    torch._foreach_copy_(wide, parameters)
                torch._foreach_lerp_(average, wide or parameters, weight)
                if wide:
                    torch._foreach_copy_(self._used[place], average)
            if self.sharded:
                torch.distributed.broadcast(self._sent[number], number % world_size())

    def _holds(self, number: int) -> bool:
        return not self.sharded or number % world_size() == rank()

    def state_dict(self) -> dict[str, Tensor]:
        """The float32 average by parameter name: what this rank holds of it."""
        held = zip(self._names, self._average, strict=True)
        return {name: tensor.detach() for name, tensor in held if tensor is not None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore an average. Raises ValueError when names differ."""
        if set(state) != set(self._names):
            raise ValueError(f"snapshot has other weights: {sorted(set(state) ^ set(self._names))[:5]}")
        for name, average, used in zip(self._names, self._average, self._used, strict=True):
            used.copy_(state[name])
            if average is not None:
                average.copy_(state[name])


def _in_one_buffer(weights: list[nn.Parameter], places: list[slice], device: torch.device) -> list[Tensor]:
    """Room in float32 for one part of `gathered_parts` at a time, in the weights' shapes."""
    parts = [[weight.numel() for weight in weights[place]] for place in places]
    buffer = torch.empty(max(map(sum, parts)), dtype=torch.float32, device=device)
    pieces = [piece for sizes in parts for piece in buffer[: sum(sizes)].split(sizes)]
    return [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor that these become views of."""
    joined = torch.cat([parameter.detach().flatten() for parameter in parameters])
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, piece in zip(parameters, joined.split(sizes), strict=True):
        parameter.data = piece.view_as(parameter)
    return joined


def _parts(count: int) -> list[slice]:
    """About twelve parts, as many for each rank."""
    number = math.ceil(12 / world_size()) * world_size()
    size = max(1, math.ceil(count / number))
    return [slice(start, start + size) for start in range(0, count, size)]


def gathered_parts(parameters: list[nn.Parameter]) -> Iterator[tuple[slice, list[nn.Parameter]]]:
    """A part of the parameters at a time, and where it lies; whole even under ZeRO-3.

    All ranks must call it.
    """
    for place in _parts(len(parameters)):
        part = parameters[place]
        partitioned = any(hasattr(p, "ds_id") for p in part)
        with _gather(part) if partitioned else contextlib.nullcontext():
            yield place, part


def _gather(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
