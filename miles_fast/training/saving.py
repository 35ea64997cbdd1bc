"""Saving beside training: state is copied to host memory, a thread writes it aside, hashes and renames it.

The ranks need no collective for it: each leaves a record beside its file, and rank 0 completes the checkpoint
when all records are there.
"""

from __future__ import annotations

import json
import math
import operator
import os
import secrets
import shutil
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles_fast.config import Config
from miles_fast.config_tree import to_dict
from miles_fast.distributed import gather_objects, rank, world_size
from miles_fast.files import flush_to_disk, write_whole
from miles_fast.models.storage import write_model
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.checkpoint import complete_checkpoints, published_names, random_state
from miles_fast.training.engine_state import counters, inner_optimizer, own_state
from miles_fast.training.host_copy import HostCopy
from miles_fast.training.manifest import CheckpointError, digest, write_manifest
from miles_fast.training.numerics import LossGuard
from miles_fast.training.snapshot import Snapshot

_POLL_SECONDS = 0.02
_ALONE_SECONDS = 120.0  # after an error, for the other ranks


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread."""

    def __init__(
        self,
        run: Path,
        config: Config,
        engine: Any,
        snapshot: Snapshot | None,
        device: torch.device,
        resumed: Path | None = None,
        guard: LossGuard | None = None,
    ) -> None:
        self.folder, self._config, self._engine, self._snapshot = (
            run / "checkpoints",
            config,
            engine,
            snapshot,
        )
        self._newest, self._guard = resumed, guard
        # Ranks must not meet what a killed run left, and need not wait until rank 0 has removed it.
        self._token = gather_objects(secrets.token_hex(4))[0]
        self._copy = HostCopy(device)
        if device.type == "cuda":
            self._copy.reserve(self._elements())
        self._state: dict[str, Tensor] = {}
        self._kept: list[Tensor] | None = None
        self._shapes = {name: tuple(_shape(p)) for name, p in engine.module.named_parameters()}
        # Now: in some weeks its folder may be gone, or the hub not answer.
        self._tokenizer = load_tokenizer(config.model.text.tokenizer_source)
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._patience = math.inf  # seconds that rank 0 waits for the others' records
        self.problem: str | None = None
        if rank() == 0:
            for left in self.folder.glob(".step-*"):
                replaced = self.folder / left.stem.removeprefix(".")
                if left.suffix == ".old" and not replaced.exists():
                    if resumed is not None and left.samefile(resumed):
                        self._newest = replaced
                    os.replace(left, replaced)  # killed before the new one was in its place
                else:
                    shutil.rmtree(left, ignore_errors=True)

    def _elements(self) -> int:
        weights = sum(t.numel() for n, t in own_state(self._engine).items() if n.startswith("weight|"))
        return 3 * weights + sum(tensor.numel() for tensor in self._beside().values())

    def _beside(self) -> dict[str, Tensor]:
        """What is copied beside the engine's state: the guard's window, and of the average a rank's own."""
        losses = self._guard.window if self._guard is not None else None
        held = self._snapshot is not None and (self._snapshot.shared or rank() == 0)
        average = self._snapshot.state_dict() if held else {}
        return ({} if losses is None else {"losses": losses}) | {f"|{n}": t for n, t in average.items()}

    def newest(self) -> Path | None:
        """This run's newest checkpoint, or what it resumed from; all ranks must call it."""
        return gather_objects(self._newest)[0]  # rank 0 completes them

    @property
    def busy(self) -> bool:
        """A checkpoint is still being written on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, skipped_data: list[tuple[int, int]]) -> None:
        """Take the state after optimizer step `step`, and have it written; the one before must be done."""
        assert not self.busy and self.problem is None
        self._partial = self.folder / f".step-{step:08d}.{self._token}"
        state = {
            "step": step,
            "skipped_data": skipped_data,
            "ranks": world_size(),
            "clips_per_step": self._engine.train_batch_size(),
            "losses_seen": self._guard.count if self._guard is not None else 0,
            "counters": counters(self._engine),
            "config": to_dict(self._config),
        }
        random = random_state()
        # Last: what else is read of the device would wait for gigabytes.
        own = self._copy.take(self._to_copy())
        arguments = (f"step-{step:08d}", own, random, state)
        self._given_up.clear()
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _to_copy(self) -> dict[str, Tensor]:
        """The same dict again, until the optimizer keeps other tensors."""
        states = inner_optimizer(self._engine).state.values()
        kept = [value for state in states for value in state.values() if torch.is_tensor(value)]
        if self._kept is None or len(kept) != len(self._kept) or any(map(operator.is_not, kept, self._kept)):
            self._state = own_state(self._engine) | self._beside()
            self._kept = kept
        return self._state

    def before_update(self) -> None:
        """Call it before weights change: the device's update waits until they are copied."""
        self._copy.hold_back_updates()

    def settle(self) -> None:
        """Wait for the checkpoint under way; all ranks must call it.

        Raises CheckpointError where a rank could not write; older checkpoints and `latest` are as they were.
        """
        while True:
            done = gather_objects((not self.busy, self.problem))
            problem = next((text for _, text in done if text), None)
            if problem:
                self._give_up(problem)
            if all(finished for finished, _ in done):
                return
            time.sleep(_POLL_SECONDS)

    def save_after_error(self, step: int, skipped_data: list[tuple[int, int]]) -> None:
        """Save the state after `step`, and wait for it, where only this rank may have had an error.

        Nothing is gathered: a rank without the error may be waiting for this one in a collective. Gloo ends
        that with an error once this rank is gone, with which the other rank saves its part, too. Rank 0
        completes the checkpoint, and waits at most `_ALONE_SECONDS` for the parts. Raises CheckpointError
        where one is missing.
        """
        self._patience = _ALONE_SECONDS
        if self._thread is not None:
            self._thread.join()
        self.problem = None
        self.start(step, skipped_data)
        self._thread.join()
        # Rank 0 needs no more of this rank, but a launcher ends it soon after the first rank has ended.
        until = time.monotonic() + (self._patience if rank() else 0)
        while self._partial.exists() and not self.problem and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        if self.problem or self._partial.exists():
            late = f"after {self._patience:g} s not all ranks had written their part"
            raise CheckpointError(f"{self._partial} could not be completed ({self.problem or late})")

    def _give_up(self, problem: str) -> None:
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        gather_objects(None)
        if rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        self.problem = None
        name = self._partial.name.split(".")[1]
        raise CheckpointError(
            f"{self.folder / name} could not be written ({problem}); older checkpoints are untouched. "
            "Free some space and go on with --resume auto"
        )

    def _run(self, name: str, *parts: Any) -> None:
        try:
            self._copy.wait()
            self._write(name, *parts)
        except Exception as error:  # whatever it is: unsaid, it would pass for a checkpoint
            self.problem = f"rank {rank()}: {error or type(error).__name__}"

    def _write(
        self,
        name: str,
        own: dict[str, Tensor],
        random: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        self._partial.mkdir(parents=True, exist_ok=True)
        average = {key[1:]: tensor for key, tensor in own.items() if key.startswith("|")}
        own = {key: tensor for key, tensor in own.items() if not key.startswith("|")}
        written = {f"rank-{rank():05d}.safetensors": own | random}
        if self._snapshot is not None and self._snapshot.shared:
            save_file(average, self._average_of(rank()))
        elif average:
            written["snapshot.safetensors"] = average
        files = {}
        for file, tensors in written.items():
            save_file(tensors, self._partial / file)
            flush_to_disk(self._partial / file)
            files[file] = digest(self._partial / file)
        write_whole(self._record(rank()), json.dumps(files))
        if rank() == 0:
            self._complete(name, state)

    def _record(self, number: int) -> Path:
        return self._partial / f".rank-{number:05d}.json"

    def _average_of(self, number: int) -> Path:
        return self._partial / f".snapshot-{number:05d}.safetensors"

    def _complete(self, name: str, state: dict[str, Any]) -> None:
        files: dict[str, dict[str, int | str]] = {}
        since = time.monotonic()
        for number in range(world_size()):
            while not self._record(number).is_file():
                if self._given_up.is_set() or time.monotonic() - since > self._patience:
                    return
                time.sleep(_POLL_SECONDS)
            files |= json.loads(self._record(number).read_text())
            self._record(number).unlink()
        if self._snapshot is not None and self._snapshot.shared:
            path = self._partial / "snapshot.safetensors"
            parts = [self._average_of(number) for number in range(world_size())]
            save_file(_joined(parts, self._snapshot.shapes), path)
            flush_to_disk(path)
            files[path.name] = digest(path)
            for part in parts:
                part.unlink()
        model = self._engine.module.model
        write_model(
            self._partial / "student",
            published_names(whole_weights([self._partial / file for file in files], self._shapes)),
            model.config,
            model.vocabulary_size,
            self._tokenizer,
        )
        write_whole(self._partial / "state.json", json.dumps(state, indent=2) + "\n")
        for path in [*(self._partial / "student").rglob("*"), self._partial / "student"]:
            flush_to_disk(path)
        for path in [*(self._partial / "student").rglob("*"), self._partial / "state.json"]:
            if path.is_file():
                files[path.relative_to(self._partial).as_posix()] = digest(path)
        write_manifest(self._partial, files)
        self._publish(name)

    def _publish(self, name: str) -> None:
        target, old = self.folder / name, self.folder / f".{name}.old"
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(self._partial, target)
        flush_to_disk(self.folder)
        write_whole(self.folder / "latest", name + "\n")
        self._newest = target
        shutil.rmtree(old, ignore_errors=True)
        kept, milestone = self._config.run.keep_checkpoints, self._config.run.milestone_every
        for path in complete_checkpoints(self.folder)[:-kept]:
            if not milestone or int(path.name.removeprefix("step-")) % milestone:
                shutil.rmtree(path)


def _joined(files: list[Path], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Whole tensors of what the ranks hold of each, flattened, in their order; the last may hold none."""
    parts = [load_file(file) for file in files]
    return {
        name: torch.cat([part[name] for part in parts if name in part]).view(shape)
        for name, shape in shapes.items()
    }


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_weights(files: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Whole float32 weights by parameter, put together from the ranks' files."""
    found: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for path in files:
        if not path.name.startswith("rank-"):
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                kind, start, parameter = name.split("|", 2) if name.count("|") > 1 else (name, "0", "")
                if kind == "weight":
                    found[parameter].append((int(start), file.get_tensor(name)))
    weights = {}
    for name, shape in shapes.items():
        parts = [values for _, values in sorted(found[name], key=lambda part: part[0])]
        weights[name] = torch.cat(parts).view(shape)
    return weights
