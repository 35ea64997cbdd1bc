"""The watchdog: ends all ranks when one of them hangs or is gone, and says which.

A thread of every rank reports to a store on rank 0 how far its training thread is; rank 0's compares. A rank
whose report stays away is gone (or its process is stopped); when no rank gets on, those that are least far
hang.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from miles_fast.distributed import logger, rank, world_size
from miles_fast.training.signals import HUNG

_VERDICT = "verdict"
_STARTING, _GOING, _BROKEN = "starting", "going", "broken"  # broken: its communication failed
_GONE_SECONDS = 120.0  # a process that runs reports every few seconds
_numbers = itertools.count()  # of the watchdogs of a process; the same on all ranks
_START_PATIENCE = 5  # times the limit: up to the end of the first step, which starts the readers and compiles


class Watchdog:
    """Watches from `start` to `close`; `report` is called by the training thread."""

    def __init__(self, hang_seconds: float) -> None:
        self._limit = hang_seconds
        self._interval = min(5.0, hang_seconds / 10)
        self._progress, self._doing, self._state = 0, "starting", _STARTING
        self.start_phases: dict[str, float] = {}  # seconds of what was reported until the first step was done
        self._phase_began = time.monotonic()
        self._looks = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.TCPStore | None = None
        self._answered = 0.0

    def start(self) -> None:
        """Connect the ranks and start watching; all ranks must call it. Without a limit it does nothing."""
        if not self._limit:
            return
        if world_size() > 1:
            self._store = _store(timedelta(seconds=min(self._limit, _GONE_SECONDS)))
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        if rank() != 0:
            threading.Thread(target=self._watch_rank_0, name="watchdog of rank 0", daemon=True).start()

    def report(self, doing: str) -> None:
        """The training thread goes on to `doing`; it does not wait."""
        if self._state == _STARTING:
            self._end_phase()
        self._progress += 1
        self._doing = doing

    def started(self) -> None:
        """The first step is done: from now on nothing may take longer than the limit."""
        if self._state == _STARTING:
            self._end_phase()
            self._state = _GOING

    def _end_phase(self) -> None:
        now = time.monotonic()
        before = self.start_phases.get(self._doing, 0.0)  # every micro step reports the same
        self.start_phases[self._doing] = before + now - self._phase_began
        self._phase_began = now

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._interval)

    def await_verdict(self) -> None:
        """Communication failed: have the rank that caused it named, which ends this process.

        Returns where none is found to be gone; the error is this rank's own then.
        """
        if self._store is None:
            return
        self._state = _BROKEN
        # Looks are counted, not seconds alone: a machine that stood still has to have looked again.
        enough, late = self._looks + 8, time.monotonic() + 40 * self._interval
        while self._looks < enough and time.monotonic() < late:
            if self._closed.wait(self._interval):
                return

    def _watch(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        while not self._closed.wait(self._interval):
            self._looks += 1
            words = str(self._looks), str(self._progress), self._state, _place(), self._doing
            try:
                reports = self._exchange("|".join(words))
            except RuntimeError as error:  # torch's errors of a store are
                if not self._closed.wait(2 * self._interval):  # at the end rank 0 may be the first to go
                    reason = str(error).splitlines()[0]
                    _end(f"rank 0 gives no sign of life: its process is gone or stopped ({reason})")
                return
            self._answered = time.monotonic()
            found = _culprit(reports, seen, time.monotonic(), self._limit, self._interval)
            if found:
                if self._store is not None:
                    self._store.set(_VERDICT, found)
                    time.sleep(3 * self._interval)  # the others read it before the store goes
                _end(found)

    def _watch_rank_0(self) -> None:
        """A store whose process is stopped does not fail: it lets the other thread wait."""
        while not self._closed.wait(self._interval):
            patience = min(self._limit, _GONE_SECONDS) + 3 * self._interval
            if time.monotonic() - self._answered > patience:
                _end(f"rank 0 gives no sign of life for {patience:.0f} s: its process is gone or stopped")

    def _exchange(self, report: str) -> list[str]:
        """Leave the own report; rank 0 gets all of them. Ends the process once rank 0 has a verdict."""
        if self._store is None:
            return [report]
        self._store.set(f"report-{rank()}", report)
        if rank() != 0:
            if self._store.check([_VERDICT]):
                _end(self._store.get(_VERDICT).decode())
            return []
        return [value.decode() for value in self._store.multi_get(_report_keys())]


def _culprit(
    reports: list[str], seen: dict[str, tuple[str, float]], now: float, limit: float, interval: float
) -> str | None:
    """Who keeps the others waiting too long; `seen` remembers since when what is as it is."""

    def unchanged_for(key: str, value: str) -> float:
        if seen.get(key, ("", 0.0))[0] != value:
            seen[key] = value, now
        return now - seen[key][1]

    rows = [report.split("|", 4) for report in reports]
    states = {row[2] for row in rows}
    broken = _BROKEN in states
    patience = 3 * interval if broken else min(limit, _GONE_SECONDS)
    silent = [n for n, row in enumerate(rows) if unchanged_for(f"beat {n}", row[0]) > patience]
    if silent:
        names = ", ".join(map(str, silent))
        return (
            f"rank {names} gives no sign of life: its process is gone or stopped, while {rows[silent[0]][4]}"
        )
    progress = [int(row[1]) for row in rows]
    if _STARTING in states:
        limit *= _START_PATIENCE
    if not rows or unchanged_for("progress", str(progress)) <= limit:
        return None
    slow = [number for number, steps in enumerate(progress) if steps == min(progress)]
    where = "; ".join(f"rank {n} hangs while {rows[n][4]}, at {rows[n][3]}" for n in slow[:8])
    return f"no progress for {limit:g} s (run.hang_seconds): {where}"


def _place() -> str:
    """Where the training thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no Python line"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _report_keys() -> list[str]:
    return [f"report-{number}" for number in range(world_size())]


def _store(timeout: timedelta) -> dist.TCPStore:
    # By the process group's own store: for a collective a rank that is gone already would be waited for.
    shared, key = dist.distributed_c10d._get_default_store(), f"watchdog {next(_numbers)}"
    if rank() == 0:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, None, True, timeout, wait_for_workers=False)
        for report in _report_keys():  # a rank may be gone before it reports
            store.set(report, f"0|0|{_STARTING}||starting")
        shared.set(key, str(store.port))
        return store
    port = int(shared.get(key))
    return dist.TCPStore(os.environ["MASTER_ADDR"], port, None, False, timeout, wait_for_workers=False)


def _end(found: str) -> None:
    logger.error("%s (host %s): all ranks end, with exit code %d", found, socket.gethostname(), HUNG)
    sys.stderr.flush()
    # The training thread may never come back from its call: no exception would reach it.
    os._exit(HUNG)
