"""What each rank holds of the float32 weights and the optimizer's moments, whatever the ZeRO stage.

A parameter's state is cut into contiguous pieces of the flattened tensor. Read back piece by piece it fits
any stage and any number of ranks. DeepSpeed's own universal checkpoint would need an offline conversion,
knows nothing of ZeRO 0, and is made of pickles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miles_fast.distributed import rank, world_size

Read = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of a flattened parameter from `start` on: their float32 weights, and where the moments are.

    The optimizer keeps its state for `flat`; the piece begins there at `offset`. One that is not trained has
    none, and every rank holds all of it, but at ZeRO 3.
    """

    name: str
    start: int
    trained: bool
    weight: Tensor
    flat: Tensor
    offset: int


def pieces(engine: Any) -> Iterator[Piece]:
    """All pieces that this rank holds: of ZeRO 1 to 3 its own, of ZeRO 0 whole parameters."""
    optimizer = engine.optimizer
    plain = _unpartitioned(optimizer) if not engine.zero_optimization_stage() else {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            yield from _stage_3_piece(name, parameter, optimizer)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield Piece(
                    name=name,
                    start=mapping.lp_fragment_address.start,
                    trained=True,
                    weight=mapping.hp_fragment.detach(),
                    flat=inner_optimizer(engine).param_groups[mapping.param_group_index]["params"][0],
                    offset=mapping.hp_fragment_address.start,
                )
        else:
            flat, offset = plain.get(id(parameter), (parameter, 0))
            weight = flat.detach().view(-1)[offset : offset + parameter.numel()]
            trained = parameter.requires_grad
            yield Piece(name=name, start=0, trained=trained, weight=weight, flat=flat, offset=offset)


def _stage_3_piece(name: str, parameter: nn.Parameter, optimizer: Any) -> Iterator[Piece]:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank() * parameter.ds_tensor.ds_numel
    length = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)  # the last ones are padded
    if length > 0:
        flat = optimizer.fp32_partitioned_groups_flat[group]
        weight = flat.detach().narrow(0, offset, length)
        yield Piece(name=name, start=start, trained=True, weight=weight, flat=flat, offset=offset)


def _unpartitioned(optimizer: Any) -> dict[int, tuple[Tensor, int]]:
    """Float32 copies that DeepSpeed keeps beside bf16 weights at ZeRO 0, by the weight's id."""
    copies: dict[int, tuple[Tensor, int]] = {}
    if hasattr(optimizer, "fp32_groups"):
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            copies |= {id(n): (w, 0) for n, w in zip(narrow, wide, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):
        for narrow, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in narrow:
                copies[id(parameter)] = flat, offset
                offset += parameter.numel()
    return copies


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps; at ZeRO 0 in float32 it wraps none."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def own_state(engine: Any) -> dict[str, Tensor]:
    """Views of what this rank has to write: `kind|start|parameter` -> 1-D, kind a moment or `weight`.

    What all ranks hold alike (ZeRO 0, frozen weights) is dealt out, a parameter at a time.
    """
    state = inner_optimizer(engine).state
    shared = not engine.zero_optimization_stage()
    found, turns = {}, itertools.cycle(range(world_size()))
    for piece in pieces(engine):
        if (shared or not piece.trained) and next(turns) != rank():
            continue
        found[f"weight|{piece.start}|{piece.name}"] = piece.weight
        for kind, values in state.get(piece.flat, {}).items():
            if _is_moment(values, piece.flat):
                part = values.view(-1).narrow(0, piece.offset, piece.weight.numel())
                found[f"{kind}|{piece.start}|{piece.name}"] = part
    return found


def _is_moment(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape


def counters(engine: Any) -> dict[str, Any]:
    """What else goes on after a resume, as json: step counts, the optimizer's numbers, the schedule."""
    numbers = {}
    first = next((piece.flat for piece in pieces(engine) if piece.trained), None)
    if first is not None:
        for kind, value in inner_optimizer(engine).state.get(first, {}).items():
            if not _is_moment(value, first):
                numbers[kind] = {"value": float(value), "tensor": torch.is_tensor(value)}
    scheduler = engine.lr_scheduler
    return {
        "engine": {name: getattr(engine, name) for name in _COUNTS},
        "optimizer": numbers,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "kinds": _kinds(engine),
    }


def _kinds(engine: Any) -> dict[str, str | None]:
    """What the optimizer and the schedule of DeepSpeed's json are; one of several of Adam's forms is Adam."""
    optimizer = type(inner_optimizer(engine)).__name__.lower()
    scheduler = engine.lr_scheduler
    return {
        "optimizer": next((name for name in ("adam", "lamb", "lion") if name in optimizer), optimizer),
        "scheduler": type(scheduler).__name__ if scheduler is not None else None,
    }


_COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@torch.no_grad()
def load_state(engine: Any, kinds: set[str], counts: dict[str, Any], read: Read) -> None:
    """Set weights, moments, counts and schedule from what `own_state` and `counters` gave on any ranks.

    `read(kind, parameter, start, stop)` gives elements of a flattened tensor. Raises ValueError for an
    optimizer or schedule of another kind.
    """
    for part, kind in _kinds(engine).items():
        saved = counts.get("kinds", {}).get(part, kind)  # which older checkpoints do not tell
        if saved != kind:
            raise ValueError(
                f"the {part} of DeepSpeed's json was {saved} and is {kind}; put it back as it was"
            )
    inner = inner_optimizer(engine)
    for piece in pieces(engine):
        stop = piece.start + piece.weight.numel()
        piece.weight.copy_(read("weight", piece.name, piece.start, stop))
        if not piece.trained:
            continue
        state = inner.state[piece.flat]
        for later in state.keys() - kinds - counts["optimizer"].keys():
            del state[later]  # of a checkpoint from before the first update there are none
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(piece.flat, requires_grad=False)
            part = state[kind].view(-1).narrow(0, piece.offset, piece.weight.numel())
            part.copy_(read(kind, piece.name, piece.start, stop))
        for kind, number in counts["optimizer"].items():
            _set_number(inner, piece.flat, kind, number)
    for name, parameter in engine.module.named_parameters():
        _set_computed(name, parameter, read)
    for name, count in counts["engine"].items():
        if name not in _COUNTS:
            raise ValueError(f"engine.{name} is no count that is known")
        setattr(engine, name, int(count))
    if (counts["scheduler"] is None) != (engine.lr_scheduler is None):
        raise ValueError("the scheduler of DeepSpeed's json was added or taken away; put it back as it was")
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(counts["scheduler"])
        # The rate lies in the optimizer: only the schedule's step puts it there.
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)


def _set_number(inner: torch.optim.Optimizer, flat: Tensor, kind: str, number: dict[str, Any]) -> None:
    state = inner.state[flat]
    if torch.is_tensor(state.get(kind)):
        state[kind].fill_(number["value"])
    elif number["tensor"]:
        on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
        device = flat.device if on_device else torch.device("cpu")
        state[kind] = torch.tensor(number["value"], dtype=torch.float32, device=device)
    else:
        state[kind] = int(number["value"])


def _set_computed(name: str, parameter: nn.Parameter, read: Read) -> None:
    """Set the weights that the passes use, in their own precision."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.view(-1).copy_(read("weight", name, 0, parameter.numel()))
        return
    partition, length = parameter.ds_tensor, parameter.ds_tensor.ds_numel
    start = min(rank() * length, parameter.ds_numel)
    stop = min(start + length, parameter.ds_numel)
    partition.data[: stop - start].copy_(read("weight", name, start, stop))
    if parameter.data.numel() == parameter.ds_numel:  # small ones stay whole between passes
        parameter.data.view(-1).copy_(read("weight", name, 0, parameter.ds_numel))
