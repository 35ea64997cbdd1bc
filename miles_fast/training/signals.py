"""Signals that ask a run to stop, and what ranks have to agree on at every step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from miles_fast.distributed import logger, rank, world_size

STOPPED = 75  # exit code of a run that a signal stopped after a checkpoint (EX_TEMPFAIL: start it again)
HUNG = 76  # exit code of a run in which a rank hangs or is gone


class Stopped(Exception):
    """A signal ended the run; its checkpoint is complete."""


def exit_with_status(main: Callable[[], None]) -> None:
    """Run a training program: what the user can mend ends it with one line, a signal with STOPPED.

    MILES_FAST_TRACEBACK=1 shows where an error was raised.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("MILES_FAST_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        logger.warning("%s", stopped)
        sys.exit(STOPPED)


class StopRequest:
    """Notes SIGTERM, SIGUSR1 (what Slurm sends before the time is up) and Ctrl-C from `listen` to `close`.

    A second Ctrl-C ends the process at once. Where it is ignored, as in a script's background, it stays so.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the signals over; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if rank() == 0:
                # Not through a buffer: what was interrupted may be writing to it.
                os.write(2, b"\nCtrl-C: a checkpoint is made after this step; again ends the run at once\n")


class Vote(NamedTuple):
    """What any rank has to say before a step: it was told to stop, it could not save, it is still saving."""

    stop: bool
    failed: bool
    saving: bool


class Ballot:
    """Has all ranks learn what any of them says, so that they act on it after the same step.

    Votes are cast before a step and counted after it: the reduction runs on the device beside the step, for
    which no rank waits for another, and is long done when the step's own wait for the gradient norm is over.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._here = torch.zeros(len(Vote._fields), pin_memory=cuda)
        self._found = torch.zeros(len(Vote._fields), pin_memory=cuda)
        self._votes = torch.zeros(len(Vote._fields), device=device)
        self._stream = torch.cuda.Stream(device) if cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which fills the votes
        self._vote = Vote(False, False, False)

    def cast(self, vote: Vote) -> None:
        """Say what this rank has to say; all ranks must call it."""
        self._vote = vote
        if world_size() == 1:
            return
        self._here.copy_(torch.tensor(vote, dtype=torch.float32))
        with torch.cuda.stream(self._stream):  # None: nothing changes
            self._votes.copy_(self._here, non_blocking=True)
            dist.all_reduce(self._votes, op=dist.ReduceOp.MAX)
            self._found.copy_(self._votes, non_blocking=True)

    def count(self) -> Vote:
        """What any rank said at the last `cast`."""
        if world_size() == 1:
            return self._vote
        if self._stream is not None:
            self._stream.synchronize()
        return Vote(*(value > 0 for value in self._found.tolist()))
