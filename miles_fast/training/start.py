"""What a run starts from: its folder, the student and its snapshot, the weights that they begin with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import IO

import torch

from miles_fast.config import Config
from miles_fast.config_tree import to_dict
from miles_fast.distributed import gather_objects, logger, rank
from miles_fast.models.compilation import compile_each
from miles_fast.models.dual_encoder import DualEncoder, build_dual_encoder
from miles_fast.models.fp8 import use_fp8
from miles_fast.models.storage import PRETRAINING, load_weights, read_description, read_weights
from miles_fast.training.checkpoint import model_folder
from miles_fast.training.ds_config import EngineSettings
from miles_fast.training.objective import Objective
from miles_fast.training.snapshot import Snapshot


class FolderLock:
    """Rank 0's lock on a run's folder, until `close` or the process' end."""

    def __init__(self, run: Path) -> None:
        self._file: IO[str] | None = None
        self.take(run)

    def take(self, run: Path) -> None:
        """Lock this folder instead. Raises ValueError where another process does."""
        if rank() != 0:
            return
        file = open(run / ".lock", "a")
        try:
            # Not flock, which processes that this one forks would hold on to when it is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise ValueError(
                    f"run.folder = {run}: another run is writing there; name another folder, or end that one"
                ) from error
            logger.warning("%s: cannot be locked (%s); do not start another run in it", run, error)
        self.close()
        self._file = file

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def make_folder(run: Path) -> FolderLock:
    """Make the run's folder where there is none, and lock it.

    Raises ValueError, on all ranks, where nothing can be written to it, or another run is writing.
    """
    problem = lock = None
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK):
            raise PermissionError("it is not writable")
        if (run / "model.safetensors").exists():
            raise ValueError(f"run.folder = {run} holds a model; name another folder, or one below it")
        lock = FolderLock(run)
    except OSError as error:
        problem = f"run.folder = {run}: a run cannot be kept there ({error}); name another folder"
    except ValueError as error:
        problem = str(error)
    for said in gather_objects(problem):
        if said is not None:
            raise ValueError(said)
    assert lock is not None
    return lock


def prepare_folder(run: Path, config: Config, lock: FolderLock, *, keep: bool) -> None:
    """Write the run's config; an earlier run in its folder is moved aside but with `keep`.

    Raises ValueError, on all ranks, where this run's tokenizer would be moved, too.
    """
    moves = rank() == 0 and not keep and (run / "config.json").exists()
    tokenizer = Path(config.model.text.tokenizer_source)
    if gather_objects(moves and tokenizer.resolve().is_relative_to(run.resolve()))[0]:
        raise ValueError(
            f"model.text.tokenizer = {tokenizer} lies in run.folder = {run}, whose run would be moved aside: "
            "name another folder for this run, or go on with that one by --resume auto"
        )
    if rank() == 0:
        if moves:
            number = next(n for n in range(1, 10**6) if not run.with_name(f"{run.name}.old-{n}").exists())
            aside = run.with_name(f"{run.name}.old-{number}")
            run.rename(aside)
            logger.info("%s held an earlier run: moved to %s (--resume auto would go on with it)", run, aside)
            run.mkdir(parents=True)
            lock.take(run)
        (run / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    gather_objects(None)


def build_models(
    config: Config, settings: EngineSettings, vocabulary_size: int, device: torch.device, *, initialize: bool
) -> tuple[Objective, Snapshot | None]:
    """Student with losses, and snapshot, compiled as the config says; `initialize`: from `run.init_from`.

    Raises ValueError for weights that do not fit and for prefixes of `run.freeze` that no weight has.
    """
    objective = Objective(
        build_dual_encoder(config.model, vocabulary_size), config.method, config.data.frames_per_clip
    )
    if config.run.init_from and initialize:
        _initialize(objective, config.run.init_from)
    freeze(objective.model, config.run.freeze)
    if config.run.precision == "fp8":
        use_fp8(objective, device)
    snapshot = None
    if config.method.view != "none":
        snapshot = Snapshot(
            objective.model,
            config.method.snapshot,
            config.method.regression,
            total_steps=config.run.steps,
            dtype=settings.dtype,
            device=device,
            shared=settings.stage == 3,
        )
    if config.run.compile:
        compile_passes(objective, snapshot, config.run.activation_memory_budget)
    return objective, snapshot


def compile_passes(objective: Objective, snapshot: Snapshot | None, memory_budget: float) -> None:
    """Have what a step runs of both towers, the snapshot and the predictor compiled when it first runs.

    What `memory_budget` means: RunConfig.activation_memory_budget.
    """
    objective.model.compile_layers(memory_budget)
    if snapshot is not None:
        snapshot.video_model.compile_layers()
    if objective.method.view == "D":
        compile_each(objective.predictor.blocks, memory_budget)
    objective.statistics = torch.compile(objective.statistics, dynamic=False)


def _initialize(objective: Objective, source: str) -> None:
    """Take weights from an exported folder, or from a run's newest checkpoint with mask token and head."""
    place = model_folder(source)
    read_description(place)
    weights = read_weights(place)
    load_weights(objective.model, weights, f"run.init_from = {source}")
    own = objective.state_dict()
    extra = {name.removeprefix(PRETRAINING): t for name, t in weights.items() if name.startswith(PRETRAINING)}
    objective.load_state_dict(
        {n: t for n, t in extra.items() if n in own and own[n].shape == t.shape}, strict=False
    )
    logger.info("initialised from %s", place)


def freeze(model: DualEncoder, prefixes: list[str]) -> None:
    """Leave the weights whose names begin so as they are. Raises ValueError for a prefix that none has."""
    for prefix in prefixes:
        frozen = [weight for name, weight in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise ValueError(f"run.freeze: no weight's name begins with {prefix!r}")
        for weight in frozen:
            weight.requires_grad_(False)
