"""CUDA graphs of a step's passes: launched as a whole, instead of kernel by kernel from Python."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miles_fast.data.batches import Batch
from miles_fast.training.objective import Objective
from miles_fast.training.snapshot import Snapshot


class _Encode(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.objective.encode(*inputs)


def capture_passes(objective: Objective, snapshot: Snapshot | None, sample: Batch) -> None:
    """Replace `Objective.encode` and `Snapshot.encode` by graphs of them and of the former's backward.

    They take batches of the sample's shapes only. Weights may change, but not move: ZeRO 0 to 2. What the
    graphs hand out is overwritten by the next micro step. The contrast and all communication stay outside.
    Random numbers go on as if nothing had been captured; must be called before other threads use the device.
    """
    module = _Encode(objective.train())
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    # The same memory as new leaves: gradients of the old ones are gathered on the stream on which DeepSpeed
    # met them first, which a captured stream must not wait for.
    leaves = [nn.Parameter(weight.detach()) for weight in weights.values()]

    def encode(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, given = tensors[: -len(leaves)], tensors[-len(leaves) :]
        return torch.func.functional_call(module, dict(zip(weights, given, strict=True)), inputs)

    inputs = [sample.video_BTCHW, sample.token_ids_BL, sample.attention_BL]
    with torch.random.fork_rng(devices=[sample.video_BTCHW.device]):
        if snapshot is not None:
            targets = (sample.video_BTCHW, sample.masked_BM)
            inputs += [sample.masked_BM, snapshot.encode(*targets)]
            snapshot.encode, graphed = torch.cuda.make_graphed_callables(
                (snapshot.encode, encode), (targets, (*inputs, *leaves)), allow_unused_input=True
            )
        else:
            graphed = torch.cuda.make_graphed_callables(encode, (*inputs, *leaves), allow_unused_input=True)
    objective.encode = lambda *tensors: graphed(*tensors, *weights.values())
