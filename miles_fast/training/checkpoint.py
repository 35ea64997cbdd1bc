"""Checkpoints: written aside, renamed when complete, restored only into the same architecture.

RUN/checkpoints/step-00000100/ holds DeepSpeed's engine state, student/ (a model folder, float32), the
snapshot's average, every rank's random state, and state.json with the step and the resolved config.
RUN/checkpoints/latest names the newest complete one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from miles_fast.config import Config, model_difference, to_dict
from miles_fast.distributed import barrier, gather_objects, logger, rank
from miles_fast.files import write_whole
from miles_fast.models.storage import PRETRAINING, write_model
from miles_fast.training.engine import full_weights
from miles_fast.training.objective import Objective
from miles_fast.training.snapshot import Snapshot


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or restored; the message names the folder and the remedy."""


def save_checkpoint(run: Path, step: int, engine: Any, snapshot: Snapshot | None, config: Config) -> Path:
    """Write the checkpoint of optimizer step `step` and drop old ones; all ranks must call it.

    Raises CheckpointError (a full disk, say) with the older checkpoints and `latest` as they were.
    """
    folder = run / "checkpoints"
    name = f"step-{step:08d}"
    partial = folder / f".{name}.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    problem = None
    try:
        _write(partial, step, engine, snapshot, config)
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = f"rank {rank()}: {error}"
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder / name} could not be written ({problems[0]}); older checkpoints are untouched. "
            "Free some space and go on with --resume auto"
        )
    if rank() == 0:
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(partial, folder / name)
        write_whole(folder / "latest", name + "\n")
        for old in sorted(folder.glob("step-*"))[: -config.run.keep_checkpoints]:
            shutil.rmtree(old)
    barrier()
    return folder / name


def _write(partial: Path, step: int, engine: Any, snapshot: Snapshot | None, config: Config) -> None:
    engine.save_checkpoint(str(partial), tag="engine", save_latest=False)
    weights = full_weights(engine)
    torch.save(_random_state(), partial / f"random-{rank()}.pt")
    if rank() != 0:
        return
    objective: Objective = engine.module
    model = objective.model
    write_model(
        partial / "student",
        published_names(weights),
        model.config,
        model.vocabulary_size,
        config.model.text.tokenizer_source,
    )
    if snapshot is not None:
        average = {key: tensor.cpu().contiguous() for key, tensor in snapshot.state_dict().items()}
        save_file(average, partial / "snapshot.safetensors")
    write_whole(
        partial / "state.json", json.dumps({"step": step, "config": to_dict(config)}, indent=2) + "\n"
    )


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that `auto` (the run's latest, or None) or a path (a run's or a checkpoint's) names.

    Raises CheckpointError when a path names none."""
    place = run if resume == "auto" else Path(resume)
    if (place / "state.json").is_file():
        return place
    latest = place / "checkpoints" / "latest"
    if latest.is_file():
        return latest.parent / latest.read_text().strip()
    if resume == "auto":
        return None
    raise CheckpointError(f"{resume}: no checkpoint there; name a run's folder or one of its checkpoints")


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the student of a checkpoint or a run's newest one.

    Raises CheckpointError when the path names none.
    """
    path = Path(path)
    if (path / "model.json").is_file():
        return path
    checkpoint = find_checkpoint(path, str(path))
    assert checkpoint is not None
    return checkpoint / "student"


def read_step(checkpoint: Path, config: Config) -> int:
    """Optimizer steps done. Raises CheckpointError showing the difference when the model section changed."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: state.json cannot be read ({error}); use an older one"
        ) from error
    changed = model_difference(state["config"]["model"], to_dict(config)["model"])
    if changed:
        raise CheckpointError(
            f"{checkpoint} is of another architecture: {'; '.join(changed)}. Restore the model section, or "
            "start a new run with run.init_from"
        )
    return state["step"]


def restore_checkpoint(checkpoint: Path, engine: Any, snapshot: Snapshot | None) -> None:
    """Load engine, snapshot and random state of this rank. Raises CheckpointError where they do not fit."""
    try:
        path, _ = engine.load_checkpoint(str(checkpoint), tag="engine")
    except (RuntimeError, AssertionError, OSError) as error:
        raise CheckpointError(f"{checkpoint}: DeepSpeed cannot restore it ({error})") from error
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
        _restore_random_state(torch.load(random, weights_only=True))
    else:
        logger.warning(
            "%s: no random state for rank %d (another number of ranks): dropout differs", random, rank()
        )


def published_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The objective's weights under the published names; what only pre-training needs gets a prefix."""
    return {
        name.removeprefix("model.") if name.startswith("model.") else PRETRAINING + name: tensor
        for name, tensor in weights.items()
    }


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
