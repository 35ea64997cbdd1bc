"""What the loop does beside its steps: checkpoints that are due, steps that were skipped, ways back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles_fast.config import Config
from miles_fast.data.batches import Batch
from miles_fast.data.loader import Loader
from miles_fast.distributed import gather_objects, logger, rank
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.training.checkpoint import read_state, restore_checkpoint
from miles_fast.training.ds_config import EngineSettings
from miles_fast.training.early_stopping import EarlyStopping
from miles_fast.training.manifest import CheckpointError
from miles_fast.training.numerics import LossGuard, NumericsError, SkippedData
from miles_fast.training.progress import StepLog
from miles_fast.training.saving import Saver
from miles_fast.training.signals import Stopped, StopRequest, Vote
from miles_fast.training.snapshot import Snapshot
from miles_fast.training.watchdog import Watchdog
from miles_fast.training.whole_student import WholeStudent

Evaluate = Callable[[DualEncoder, torch.device], dict[str, Any]]
Deal = Callable[[Loader, int], Generator[Batch, None, None]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the loop works with."""

    config: Config
    settings: EngineSettings
    engine: Any
    student: WholeStudent
    snapshot: Snapshot | None
    loader: Loader
    deal: Deal
    evaluate: Evaluate | None
    run: Path
    device: torch.device
    log: StepLog
    saver: Saver
    stop: StopRequest
    watchdog: Watchdog
    guard: LossGuard
    left_out: SkippedData
    trust_checkpoint: bool
    stopping: EarlyStopping | None


def save_if_due(t: Training, step: int, vote: Vote, *, last: bool, best: dict[str, Any] | None) -> None:
    """Begin a checkpoint where one is due. One that is wanted now is waited for; so is a failed one.

    `best` is the evaluation that found the model after `step` the best one: it is kept. Raises Stopped where
    a signal ended the run before its `last` step.
    """
    run, ends = t.config.run, last or vote.stop
    due = ends or best is not None or step % run.save_every == 0
    if not (due or vote.failed):
        return
    t.watchdog.report(f"saving after step {step}")
    if ends or vote.failed or best is not None:
        with _tolerating_save_errors(t):
            t.saver.settle()
    elif vote.saving:
        logger.warning("step %d: the checkpoint before is still being written; this one is left out", step)
        return
    if due:
        t.saver.start(step, t.left_out.ranges)
        t.left_out.saved()
    if ends:
        t.saver.settle()
    if best is not None:
        keep_best(t, step, best)
    if vote.stop and not last:
        raise Stopped(
            f"stopped by {t.stop.signal or 'a signal to another rank'} after step {step}: "
            "its checkpoint is complete, --resume auto goes on"
        )


def keep_best(t: Training, step: int, result: dict[str, Any]) -> None:
    """Keep the model after `step`, which an evaluation found best, once its checkpoint is complete."""
    assert t.stopping is not None
    with _tolerating_save_errors(t):
        try:
            t.saver.settle()
            problem = None
            if rank() == 0:
                try:
                    t.stopping.keep(t.saver.folder / f"step-{step:08d}" / "student", step, result)
                except OSError as error:
                    problem = str(error)
            if problem := gather_objects(problem)[0]:
                raise CheckpointError(problem)
        except CheckpointError:
            t.stopping.lost(step)
            raise


@contextlib.contextmanager
def saving_on_error(t: Training, step: int) -> Iterator[None]:
    """Have an evaluation after `step` that fails leave the checkpoint that would have been made behind it."""
    try:
        yield
    except Exception:
        t.watchdog.report(f"saving after step {step}, whose evaluation failed")
        try:
            t.saver.save_after_error(step, t.left_out.ranges)
        except Exception as problem:  # whatever it is: the evaluation's error is the one to be raised
            logger.error("the evaluation after step %d failed, and nothing was saved: %s", step, problem)
        else:
            logger.info("the evaluation after step %d failed; the checkpoint of that step is complete", step)
        raise


@contextlib.contextmanager
def _tolerating_save_errors(t: Training) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        if t.config.run.on_save_error == "stop":
            raise
        logger.error("%s; training goes on (run.on_save_error)", error)


def skipped(t: Training, step: int, data: int) -> bool:
    """Record a step that changed nothing on any rank; True: enough of them, go back."""
    blamed = t.guard.blame()
    back = t.left_out.skipped(data)
    shown = "; ".join(
        f"rank {b['rank']}: loss {b['loss']:.4g}, {', '.join(b['keys'][:4])}" for b in blamed[:4]
    )
    logger.warning("step %d was skipped on all ranks (%d so far): %s ...", step, t.left_out.total, shown)
    t.log.write(step, {"skipped": blamed, "skipped_steps": t.left_out.total})
    return back


def roll_back(t: Training, step: int) -> int:
    """Restore the run's newest checkpoint, or what it resumed from, and return its step.

    `latest` may name one that the run was resumed from before. Raises NumericsError where there is none.
    """
    t.watchdog.report(f"rolling back from step {step}")
    with _tolerating_save_errors(t):
        t.saver.settle()
    checkpoint = t.saver.newest()
    if checkpoint is None:
        raise NumericsError(
            f"{t.config.run.max_skipped_steps} steps in a row up to step {step} were skipped, and there is "
            "no checkpoint to go back to: lower the learning rate, or look at the samples in log.jsonl"
        )
    state = read_state(checkpoint, t.config)
    restore_checkpoint(checkpoint, state, t.engine, t.snapshot, t.guard, trust=t.trust_checkpoint)
    t.left_out.leave_out(state["step"])
    logger.warning("went back from step %d to %s; data left out: %s", step, checkpoint, t.left_out.ranges)
    t.log.write(step, {"rolled_back_to": state["step"], "skipped_data": t.left_out.ranges})
    t.log.go_back(state["step"])
    return state["step"]
