"""CUDA graphs of a step's passes: launched as a whole, instead of kernel by kernel from Python."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miles_fast.config import Config
from miles_fast.data.augmentation import pixel_dtype
from miles_fast.distributed import rank
from miles_fast.training.masks import draw_step_masks
from miles_fast.training.objective import Objective
from miles_fast.training.snapshot import Snapshot


class _Encode(nn.Module):
    """`Objective.encode`, its texts on a stream beside the videos'.

    Their kernels are short and fill few of the multiprocessors. Backward runs where forward did.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective, self.beside = objective, torch.cuda.Stream()

    def forward(
        self, video_BTCHW: Tensor, token_ids_BL: Tensor, attention_BL: Tensor, *masks: Tensor
    ) -> tuple[Tensor, ...]:
        here = torch.cuda.current_stream()
        self.beside.wait_stream(here)
        with torch.cuda.stream(self.beside):
            text_BE = self.objective.model.embed_text(token_ids_BL, attention_BL)
        videos = self.objective.encode_videos(video_BTCHW, *masks)
        here.wait_stream(self.beside)
        return text_BE, *videos


def sample_inputs(config: Config, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Tensors like those that the loader gives of a batch: pixels, token ids, attention, and any masks."""
    size = config.model.video.image_size
    shape = (batch, config.data.frames_per_clip, 3, size, size)
    video_BTCHW = torch.zeros(shape, dtype=pixel_dtype(device), device=device)
    token_ids_BL = torch.zeros(batch, config.data.caption_tokens, dtype=torch.long, device=device)
    inputs = (video_BTCHW, token_ids_BL, torch.ones_like(token_ids_BL))
    if config.method.view == "none":
        return inputs
    return *inputs, torch.from_numpy(draw_step_masks(config, batch, rank(), 0)).to(device)


def capture_passes(objective: Objective, snapshot: Snapshot | None, inputs: tuple[Tensor, ...]) -> None:
    """Replace `Objective.encode` and `Snapshot.encode` by graphs of them and of the former's backward.

    They take inputs of these shapes only (`sample_inputs`). Weights may change, but not move: ZeRO 0 to 2.
    What the graphs hand out is overwritten by the next micro step. The contrast and all communication stay
    outside. Random numbers go on as if nothing had been captured; must be called before other threads use
    the device.
    """
    module = _Encode(objective.train())
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    # The same memory as new leaves: gradients of the old ones are gathered on the stream on which DeepSpeed
    # met them first, which a captured stream must not wait for.
    leaves = [nn.Parameter(weight.detach()) for weight in weights.values()]

    def encode(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, given = tensors[: -len(leaves)], tensors[-len(leaves) :]
        return torch.func.functional_call(module, dict(zip(weights, given, strict=True)), inputs)

    with torch.random.fork_rng(devices=[inputs[0].device]):
        if snapshot is not None:
            video_BTCHW, *_, masked_BM = inputs
            targets = (video_BTCHW, masked_BM)
            snapshot.encode, graphed = torch.cuda.make_graphed_callables(
                (snapshot.encode, encode),
                (targets, (*inputs, snapshot.encode(*targets), *leaves)),
                allow_unused_input=True,
            )
        else:
            graphed = torch.cuda.make_graphed_callables(encode, (*inputs, *leaves), allow_unused_input=True)
    objective.encode = lambda *tensors: graphed(*tensors, *weights.values())
