"""The published checkpoints, `.pth`: MILES's and Frozen's (spec/miles.md 7), read without running their code.

They are dicts whose `state_dict` has the weights; beside it stand pickled objects of the authors' own classes
(`parse_config.ConfigParser`). torch's restricted unpickler builds nothing that it does not know; the foreign
names are given to it as empty classes, so that nothing is imported and nothing called.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from miles_fast.files import whole_file

Lineage = Literal["official", "frozen"]
# What torch raises for what is no checkpoint; its unpickler runs into the others on text or a cut file.
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError),
    *(LookupError, AttributeError, struct.error),
)
_OWN = "miles_fast"  # where a checkpoint of ours keeps what the weights do not tell
_TEXT_PROJECTION = {"official": "text_proj.", "frozen": "txt_proj."}


class _Inert:
    """Stands for an object of a foreign class: takes any arguments and state, and does nothing with them."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint_file(
    path: str | Path, lineage: Lineage | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Float32 weights under the published names of MILES, and our own description (empty in foreign files).

    Without a lineage the name of the text projection tells it. `module.` is stripped, Frozen's `txt_proj.`
    renamed, the constant buffer `position_ids` dropped. Raises ValueError naming the file, for what is no
    such checkpoint or calls for a forbidden module.
    """
    path = Path(path)
    content = _unpickle(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if (
        state is None
        and isinstance(content, dict)
        and content
        and all(map(torch.is_tensor, content.values()))
    ):
        state = content
    if not isinstance(state, dict):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        kind = lineage or "official or frozen"
        raise ValueError(f"{path}: no `state_dict` in it (found: {found}); name a checkpoint of {kind}")
    wrong = [str(name) for name, value in state.items() if not torch.is_tensor(value)]
    if wrong or not state:
        raise ValueError(f"{path}: `state_dict` holds no tensors under {wrong or 'any name'}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if lineage is None:
        frozen = any(name.startswith(_TEXT_PROJECTION["frozen"]) for name in state)
        lineage = "frozen" if frozen else "official"
    theirs = _TEXT_PROJECTION[lineage]
    weights = {}
    for name, tensor in state.items():
        if name.endswith("embeddings.position_ids"):
            continue
        if name.startswith(theirs):
            name = _TEXT_PROJECTION["official"] + name.removeprefix(theirs)
        elif name.startswith(tuple(_TEXT_PROJECTION.values())):
            other = next(kind for kind in _TEXT_PROJECTION if kind != lineage)
            raise ValueError(f"{path}: has {name}, which is how {other} names it; use --from {other}")
        weights[name] = tensor.float().contiguous()
    own = content.get(_OWN)
    return weights, own if isinstance(own, dict) else {}


def write_checkpoint_file(
    path: Path, weights: dict[str, Tensor], lineage: Lineage, description: dict[str, Any]
) -> None:
    """Write what the authors' code loads; `description` goes along under a key that it does not look at."""
    theirs, ours = _TEXT_PROJECTION[lineage], _TEXT_PROJECTION["official"]
    state = {
        theirs + name.removeprefix(ours) if name.startswith(ours) else name: tensor
        for name, tensor in weights.items()
    }
    with whole_file(path) as partial:
        torch.save({"arch": "MILES", "epoch": 0, "state_dict": state, _OWN: description}, partial)


def _unpickle(path: Path) -> Any:
    try:
        with _foreign_names(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        detail = next((line for line in reason if "GLOBAL" in line or "blocked" in line), reason[0])
        if "Re-running" in detail:  # torch's advice is to unpickle it all
            detail = "no pickle that torch reads so"
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({detail.strip()})") from error


def _foreign_names(path: Path) -> contextlib.AbstractContextManager[None]:
    """Lets torch's unpickler meet the file's foreign names: each becomes an empty class of that name."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _UNREADABLE:  # of torch before 1.6: read as far as that needs no foreign name
        return contextlib.nullcontext()
    stand_ins: list[tuple[Callable, str]] = [(type(name, (_Inert,), {}), name) for name in names]
    return torch.serialization.safe_globals(stand_ins)
