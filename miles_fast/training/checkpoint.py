"""Checkpoints on disk: found, checked, and restored into any ZeRO stage and number of ranks.

RUN/checkpoints/step-00000100/ holds rank-00000.safetensors and so on (each rank's pieces of weights and
moments, and its random state), snapshot.safetensors (the average), student/ (a model folder, float32),
state.json (step, counts, schedule, the resolved config) and manifest.json. RUN/checkpoints/latest names the
newest complete one. `saving` writes them. Nothing in them is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from miles_fast.config import Config
from miles_fast.config_tree import differences, section_difference, to_dict
from miles_fast.distributed import gather_objects, logger, rank
from miles_fast.models.storage import PRETRAINING
from miles_fast.training.engine_state import load_state
from miles_fast.training.manifest import MANIFEST, CheckpointError, check_files, read_manifest
from miles_fast.training.numerics import LossGuard
from miles_fast.training.snapshot import Snapshot

_STEP = re.compile(r"step-\d{8}")


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that `auto` (the run's latest, or None) or a path (a run's or a checkpoint's) names.

    Raises CheckpointError when a path names none."""
    place = run if resume == "auto" else Path(resume)
    if (place / "state.json").is_file():
        return place
    latest = place / "checkpoints" / "latest"
    if latest.is_file():
        name = latest.read_text(errors="replace").strip()
        if not _STEP.fullmatch(name):
            raise CheckpointError(f"{latest} holds {name[:80]!r}, not the name of a checkpoint beside it")
        if (latest.parent / name).is_dir():
            return latest.parent / name
        # Killed while a checkpoint of the same step was being replaced.
        if (latest.parent / f".{name}.old" / MANIFEST).is_file():
            return latest.parent / f".{name}.old"
    # `latest` is written behind the checkpoint that it names, and may not have been copied with it.
    if complete := complete_checkpoints(latest.parent):
        logger.warning("%s names no checkpoint that is there: %s is the newest", latest, complete[-1])
        return complete[-1]
    if resume == "auto":
        return None
    raise CheckpointError(f"{resume}: no checkpoint there; name a run's folder or one of its checkpoints")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder of them, in the order in which they were written."""
    found = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the checked student of a checkpoint or a run's newest.

    Raises CheckpointError when the path names none, or its files are not those of the manifest.
    """
    path = Path(path)
    if (path / "model.json").is_file():
        return path
    checkpoint = find_checkpoint(path, str(path))
    assert checkpoint is not None
    if (checkpoint / MANIFEST).is_file():
        check_files(checkpoint, "student/")
    return checkpoint / "student"


def read_state(checkpoint: Path, config: Config) -> dict[str, Any]:
    """state.json of a checkpoint: `step` optimizer steps are done, `skipped_data` were left out, and so on.

    Raises CheckpointError showing the difference when the model section changed.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        model, step = state["config"]["model"], state["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: state.json cannot be read ({error}); use an older one"
        ) from error
    now = to_dict(config)
    changed = section_difference(model, now["model"])
    if changed:
        raise CheckpointError(
            f"{checkpoint} is of another architecture: {'; '.join(changed)}. Restore the model section, or "
            "start a new run with run.init_from"
        )
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{checkpoint}: state.json says step = {step!r}; use an older checkpoint")
    if others := differences(state["config"], {name: now[name] for name in ("data", "method", "run")}):
        logger.info("%s was made with other settings: %s", checkpoint, "; ".join(others)[:2000])
    return state


def restore_checkpoint(
    checkpoint: Path,
    state: dict[str, Any],
    engine: Any,
    snapshot: Snapshot | None,
    guard: LossGuard | None = None,
    *,
    trust: bool = False,
) -> None:
    """Check the files, then load engine, snapshot, and this rank's random state and window of losses.

    All ranks must call it.

    A checkpoint without a manifest is a folder of DeepSpeed's pickles, which can run any code: it is loaded
    only with `trust`. Raises CheckpointError where something is damaged or does not fit.
    """
    if not (checkpoint / MANIFEST).is_file():
        _restore_deepspeed(checkpoint, engine, snapshot, trust)
        return
    check_files(checkpoint, by_all_ranks=True)
    problem = None
    try:
        _load(checkpoint, state, engine, snapshot, guard)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        problem = f"{checkpoint}: does not fit this run on rank {rank()} ({error})"
    # All ranks end together, rather than the others waiting for one in their first step.
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        raise CheckpointError(problems[0])


def _load(
    checkpoint: Path, state: dict[str, Any], engine: Any, snapshot: Snapshot | None, guard: LossGuard | None
) -> None:
    with contextlib.ExitStack() as stack:
        parts: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
        own: dict[str, Tensor] = {}
        files = read_manifest(checkpoint)
        for number, listed in enumerate(sorted(name for name in files if name.startswith("rank-"))):
            file = stack.enter_context(safe_open(checkpoint / listed, framework="pt"))
            for name in file.keys():
                if name.count("|") < 2:  # a rank's own
                    if number == rank():
                        own[name] = file.get_tensor(name)
                    continue
                kind, start, parameter = name.split("|", 2)
                parts[kind, parameter].append((int(start), file.get_slice(name)))

        def read(kind: str, parameter: str, start: int, stop: int) -> Tensor:
            if (kind, parameter) not in parts:
                frozen = "; was it in run.freeze? It cannot be taken out in a run" if kind != "weight" else ""
                raise KeyError(f"no {kind} of {parameter}{frozen}")
            values, filled = torch.empty(stop - start), 0
            for first, part in parts[kind, parameter]:
                low, high = max(start, first), min(stop, first + part.get_shape()[0])
                if low < high:
                    values[low - start : high - start] = part[low - first : high - first]
                    filled += high - low
            if filled != stop - start:
                raise ValueError(f"{kind} of {parameter}: {filled} of {stop - start} elements are there")
            return values

        kinds = {kind for kind, _ in parts} - {"weight"}
        load_state(engine, kinds, state["counters"], read)
    if snapshot is not None:
        if "snapshot.safetensors" not in files:
            raise ValueError("it has no snapshot: the run had method.view = none")
        snapshot.load_state_dict(load_file(checkpoint / "snapshot.safetensors"))
    losses = own.pop("losses", None)
    if losses is not None and guard is not None:
        guard.restore(losses, state["losses_seen"])
    if own:
        _restore_random_state(own)
    else:
        logger.warning("%s: no random state for rank %d (another number of ranks)", checkpoint, rank())


def _restore_deepspeed(checkpoint: Path, engine: Any, snapshot: Snapshot | None, trust: bool) -> None:
    if not (checkpoint / "engine").is_dir():
        raise CheckpointError(f"{checkpoint} has no {MANIFEST}: it is incomplete; use another one")
    if not trust:
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST}: it holds DeepSpeed's own files (of an earlier version, or from "
            "elsewhere), which are pickles, and a pickle can run any code when it is loaded. If you know who "
            "wrote it, add --trust-checkpoint; its weights alone can be taken with run.init_from"
        )
    try:
        path, _ = engine.load_checkpoint(str(checkpoint), tag="engine")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, OSError) as error:
        raise CheckpointError(f"{checkpoint}: DeepSpeed cannot restore it ({error!r})") from error
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed found nothing to restore in engine/")
    if snapshot is not None:
        try:
            snapshot.load_state_dict(load_file(checkpoint / "snapshot.safetensors"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{checkpoint}: the snapshot cannot be read ({error}); the run had method.view = none?"
            ) from error
    random = checkpoint / f"random-{rank()}.pt"
    if random.is_file():
        state = torch.load(random, weights_only=True)
        _restore_random_state({f"random|{name}": values for name, values in state.items()})


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The objective's weights under the published names; what only pre-training needs gets a prefix."""
    return {
        name.removeprefix("model.") if name.startswith("model.") else PRETRAINING + name: tensor
        for name, tensor in weights.items()
    }


def random_state() -> dict[str, Tensor]:
    """States of torch's generators, as they stand in a rank's file."""
    state = {"random|cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random|cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["random|cpu"])
    if "random|cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random|cuda"])
