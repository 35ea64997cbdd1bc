"""The step log: progress bar, JSONL and TensorBoard, written by rank 0 every n steps."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from miles_fast.distributed import note_once, rank
from miles_fast.files import write_whole


class StepLog:
    """Writes records of a run; a resumed run goes on behind its last step."""

    def __init__(self, run: Path, first_step: int, total_steps: int) -> None:
        self._file = self._board = None
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
        path = run / "log.jsonl"
        if path.exists():
            _cut(path, first_step)
        self._file = open(path, "a", buffering=1)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            note_once("tensorboard is not installed: log.jsonl holds the figures instead")
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def advance(self) -> None:
        """One more optimizer step is done."""
        self._bar.update()

    def go_back(self, step: int) -> None:
        """Training goes on behind an earlier step; the records stay."""
        self._bar.n = step
        self._bar.refresh()

    def write(self, step: int, record: dict[str, Any], show: tuple[str, ...] = ()) -> None:
        """Write a record of finite or non-finite scalars and nested dicts; `show` go to the progress bar."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **record}) + "\n")
        for name, value in _flat(record):
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if show:
            self._bar.set_postfix({name: f"{record[name]:.4g}" for name in show if name in record})

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if rank() == 0:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """All records of a run's log.jsonl."""
    with open(run / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def _cut(path: Path, first_step: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a full disk cuts the last one
    write_whole(path, "".join(line for line in whole if json.loads(line)["step"] <= first_step))


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for name, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            pairs.append((prefix + name, value))
    return pairs
