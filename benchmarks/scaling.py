"""Weak scaling: the same run on more and more GPUs of this host, started by DeepSpeed's launcher."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from driver import numbers_on_host
from loader_stages import WARMUP

from miles_fast.training.progress import read_log

PROGRAM = Path(__file__).resolve().parents[1] / "launch" / "pretrain.py"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over a run's log after the warm-up; `ratio` is its clips/s against those of the first row.

    `allocation_retries`, of all its GPUs together: their memory was all but full where there are any.
    `alone`: clips/s of each of its GPUs in a run of its own, all at the same time. What those lose against
    a first row of one GPU is the cards' and the host's; what the row loses against the slowest of them is
    communication, and waiting for whichever is slower at the moment.
    """

    gpus: int
    clips_per_second: float
    ratio: float
    step_milliseconds: float
    data_wait_milliseconds: float
    memory_gib: float | None
    allocation_retries: int
    alone: list[float] | None


def measure_scaling(
    counts: Sequence[int],
    config_file: str,
    ds_config: str,
    overrides: Sequence[str],
    steps: int,
    *,
    singles: bool = False,
) -> Generator[Row, None, None]:
    """Train `steps` steps on each number of GPUs (of CPU ranks, without a GPU), the same clips on each.

    `singles` measures `Row.alone` too. Raises SystemExit with the launcher's code where a run fails; it has
    said why by then.
    """
    options = ("--config", config_file, "--ds_config", ds_config, *overrides, "data.evaluation=[]")
    options = (*options, f"run.steps={steps}", f"run.save_every={steps}", "run.log_every=5")
    first = None
    for count in counts:
        (figures,) = _train([range(count)], options)
        speed, alone = figures["clips_per_second"], None
        if singles and count > 1:
            alone = [one["clips_per_second"] for one in _train([[gpu] for gpu in range(count)], options)]
        first = first or speed
        yield Row(gpus=count, ratio=speed / first, alone=alone, **figures)


def _train(runs: Sequence[Sequence[int]], options: Sequence[str]) -> list[dict[str, Any]]:
    """One run on each of these sets of GPUs, all at the same time: what `Row` holds of its log."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(len(runs))]
        begun = [
            _launch(gpus, *options, f"run.folder={run}", "run.patience=0")
            for gpus, run in zip(runs, folders, strict=True)
        ]
        if codes := [code for code in [run.wait() for run in begun] if code]:
            sys.exit(codes[0])
        return [_figures(run) for run in folders]


def _figures(run: Path) -> dict[str, Any]:
    records = [r for r in read_log(run) if "loss" in r and r["step"] > WARMUP]
    names = ("clips_per_second", "step_milliseconds", "data_wait_milliseconds")
    medians = {name: statistics.median(record[name] for record in records) for name in names}
    retries = sum(record.get("allocation_retries", 0) for record in records)
    return medians | {"memory_gib": records[-1].get("memory_gib"), "allocation_retries": retries}


def _launch(gpus: Sequence[int], *options: str) -> subprocess.Popen[bytes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    which = ("--num_gpus", str(len(gpus)))
    if torch.cuda.is_available():  # --include counts the host's GPUs, whatever CUDA_VISIBLE_DEVICES leaves
        numbers = numbers_on_host()
        which = ("--include", "localhost:" + ",".join(numbers[gpu] for gpu in gpus))
    launcher = (sys.executable, "-m", "deepspeed.launcher.runner", *which, "--master_port", port)
    return subprocess.Popen([*launcher, str(PROGRAM), *options])


HEAD = f"{'GPUs':>5}{'clips/s':>12}{'ratio':>8}{'ms':>10}{'data ms':>10}{'GiB':>8}  each GPU alone"


def line(row: Row) -> str:
    """The row for people, under HEAD."""
    memory = "-" if row.memory_gib is None else f"{row.memory_gib:.1f}"
    alone = "-" if row.alone is None else " + ".join(f"{one:.2f}" for one in row.alone)
    return (
        f"{row.gpus:>5}{row.clips_per_second:>12.2f}{row.ratio:>8.3f}{row.step_milliseconds:>10.2f}"
        f"{row.data_wait_milliseconds:>10.2f}{memory:>8}  {alone}"
    )
