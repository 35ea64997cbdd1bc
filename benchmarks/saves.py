"""What checkpoints cost a training run: steps beside one that is written against the run's other steps."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from loader_stages import WARMUP

from miles_fast.config_tree import load_config
from miles_fast.data.batches import Batch
from miles_fast.data.loader import Loader
from miles_fast.training import loop
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.saving import Saver


@dataclass(frozen=True, kw_only=True)
class Saves:
    """Medians over a run behind its warm-up.

    `copy_milliseconds`: by what the step behind which the state is copied and the next one, whose update
    waits for the copy, are longer than two others. `lost_milliseconds`: by what a save makes the run longer,
    of all steps that it touches and on average. `slower`: that, as a share, with the config's `save_every`.
    """

    saves: int
    gib: float
    writing_seconds: float
    free_milliseconds: float
    beside_milliseconds: float | None
    copy_milliseconds: float
    lost_milliseconds: float
    save_every: int
    slower: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """When a save began and was complete."""

    began: float
    ended: float


def measure_saves(
    config_file: str, overrides: Sequence[str], ds_tree: dict[str, Any], steps: int, saves: int
) -> Saves:
    """Train `steps` steps behind the warm-up with so many saves among them.

    Raises ValueError where the disk is so slow that a save is under way at every step.
    """
    found: list[Span] = []
    dealt: list[float] = []

    class TimedSaver(Saver):
        def start(self, *rest: Any) -> None:
            self.began = time.perf_counter()
            super().start(*rest)

        def _run(self, *rest: Any) -> None:
            super()._run(*rest)
            found.append(Span(began=self.began, ended=time.perf_counter()))

    def deal(loader: Loader, first_step: int) -> Generator[Batch, None, None]:
        with contextlib.closing(loader.batches(first_step)) as batches:
            while True:
                for part in range(loader.share.accumulation):
                    batch = next(batches)
                    if part == 0:
                        dealt.append(time.perf_counter())
                    yield batch
                    del batch

    every = -(-(WARMUP + steps) // (saves + 1))  # the last step's own is none of them
    with tempfile.TemporaryDirectory() as folder:
        run = [f"run.steps={WARMUP + steps}", f"run.folder={folder}/run", f"run.log_every={WARMUP + steps}"]
        config = load_config(config_file, [*overrides, *run, f"run.save_every={every}"])
        settings = check_ds_config(ds_tree, "ds config", config, cuda=torch.cuda.is_available(), ranks=1)
        with mock.patch.object(loop, "Saver", TimedSaver):
            loop.pretrain(config, settings, deal=deal)
        files = (Path(config.run.folder) / "checkpoints").glob(f"step-{WARMUP + steps:08d}/**/*")
        gib = sum(file.stat().st_size for file in files) / 2**30
    configured = load_config(config_file, overrides).run.save_every
    return summary(dealt[WARMUP:], found[:-1], gib=gib, save_every=configured)


def summary(dealt: Sequence[float], saves: Sequence[Span], *, gib: float, save_every: int) -> Saves:
    """Of the moments when steps got their batches, and of the saves among them."""
    times = [stop - start for start, stop in itertools.pairwise(dealt)]
    touched = [
        any(save.began < stop and start < save.ended for save in saves)
        for start, stop in itertools.pairwise(dealt)
    ]
    # The step during which it began, and the next.
    copied = [bisect.bisect_right(dealt, save.began) - 1 for save in saves]
    pairs = [(first, first + 1) for first in copied if 0 <= first < len(times) - 1]
    free = [seconds for seconds, busy in zip(times, touched, strict=True) if not busy]
    if not free or not pairs:
        raise ValueError("a checkpoint was always being written, or never: take more --batches")
    around = {step for pair in pairs for step in pair}
    beside = [times[step] for step, busy in enumerate(touched) if busy and step not in around]
    usual = statistics.median(free)
    changed = around | {step for step, busy in enumerate(touched) if busy}
    lost = sum(times[step] - statistics.mean(free) for step in changed) / len(pairs)
    return Saves(
        saves=len(pairs),
        gib=gib,
        writing_seconds=statistics.median(save.ended - save.began for save in saves),
        free_milliseconds=1000 * usual,
        beside_milliseconds=1000 * statistics.median(beside) if beside else None,
        copy_milliseconds=1000 * statistics.median(times[a] + times[b] - 2 * usual for a, b in pairs),
        lost_milliseconds=1000 * lost,
        save_every=save_every,
        slower=lost / (save_every * usual),
    )


def table(found: Saves) -> str:
    """The figures for people."""
    beside = found.beside_milliseconds
    share = "" if beside is None else f"   ({100 * (beside / found.free_milliseconds - 1):+.1f} %)"
    rows = (
        ("saves of the run, GiB each", f"{found.saves:>9}{found.gib:>9.2f}"),
        ("written within, s", f"{found.writing_seconds:>9.2f}"),
        ("a step with none under way, ms", f"{found.free_milliseconds:>9.2f}"),
        ("a step beside the writer, ms", f"{beside or float('nan'):>9.2f}{share}"),
        ("the two steps around the copy, longer by, ms", f"{found.copy_milliseconds:>9.2f}"),
        ("a save makes the run longer by, ms", f"{found.lost_milliseconds:>9.2f}"),
        (f"a run that saves every {found.save_every} steps is slower by, %", f"{100 * found.slower:>9.3f}"),
    )
    return "\n".join(f"{name:<52}{value}" for name, value in rows)
