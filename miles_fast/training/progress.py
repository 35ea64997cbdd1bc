"""The step log: progress bar, JSONL and TensorBoard, written by rank 0 every n steps."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from miles_fast.distributed import logger, note_once, rank
from miles_fast.files import write_whole


class StepLog:
    """Writes records of a run; a resumed run goes on behind its last step.

    A disk that is full ends no run: records wait in memory until it takes them, TensorBoard's are left out.
    """

    def __init__(self, run: Path, first_step: int, total_steps: int) -> None:
        self.is_empty = True  # of records of this process
        self._file = self._board = None
        self._waiting = b""
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=rank() != 0,
            file=sys.stderr,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
        )
        if rank() != 0:
            return
        path = self._path = run / "log.jsonl"
        if path.exists():
            _cut(path, first_step)
        self._file = open(path, "ab", buffering=0)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            note_once("tensorboard is not installed: log.jsonl holds the figures instead")
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def advance(self) -> None:
        """One more optimizer step is done."""
        self._bar.update()

    def go_back(self, step: int) -> None:
        """Training goes on behind an earlier step; the records stay."""
        self._bar.n = step
        self._bar.refresh()

    def write(self, step: int, record: dict[str, Any], show: tuple[str, ...] = ()) -> None:
        """Write a record of finite or non-finite scalars and nested dicts; `show` go to the progress bar."""
        self.is_empty = False
        if self._file is None:
            return
        line = json.dumps({"step": step, "time": round(time.time(), 3), **record}) + "\n"
        full = bool(self._waiting)
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not full:
                logger.error("%s: %s; its records wait until the disk takes them", self._path, error.strerror)
        try:
            for name, value in _flat(record):
                if self._board is not None:
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            logger.error("TensorBoard's file: %s; only log.jsonl goes on", error.strerror)
            self._board = None
        if show:
            self._bar.set_postfix({name: f"{record[name]:.4g}" for name in show if name in record})

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
            if self._waiting:
                logger.error("%s: the disk was full to the end: records are missing", self._path)
        if self._board is not None:
            with contextlib.suppress(OSError):  # a full disk; said where records were written
                self._board.close()


def process_seconds() -> float:
    """Seconds since this process was started, its imports included."""
    import psutil  # which DeepSpeed needs

    return time.time() - psutil.Process().create_time()


def read_log(run: Path) -> list[dict[str, Any]]:
    """All records of a run's log.jsonl, as `read_records` reads them."""
    return read_records(run / "log.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a log but a last one that a full disk cut. Raises ValueError for a line that is none."""
    records = []
    *lines, _ = path.read_bytes().split(b"\n")  # behind the last line's end there is nothing, or what was cut
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode())
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            shown = line[:40].decode(errors="replace")
            raise ValueError(f"{path}: line {number} is not a record ({shown}); delete that line")
        records.append(record)
    return records


def _cut(path: Path, first_step: int) -> None:
    kept = [record for record in read_records(path) if record["step"] <= first_step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for name, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            pairs.append((prefix + name, value))
    return pairs
