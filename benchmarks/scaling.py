"""Weak scaling: the same run on more and more GPUs of this host, started by DeepSpeed's launcher."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loader_stages import WARMUP

from miles_fast.training.progress import read_log

PROGRAM = Path(__file__).resolve().parents[1] / "launch" / "pretrain.py"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over a run's log after the warm-up; `ratio` is its clips/s against those of the first row."""

    gpus: int
    clips_per_second: float
    ratio: float
    step_milliseconds: float
    data_wait_milliseconds: float
    memory_gib: float | None


def measure_scaling(
    counts: Sequence[int], config_file: str, ds_config: str, overrides: Sequence[str], steps: int
) -> list[Row]:
    """Train `steps` steps on each number of GPUs (of CPU ranks, without a GPU), the same clips on each.

    Raises SystemExit with the launcher's code where a run fails; it has said why by then.
    """
    rows: list[Row] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            _launch(
                count,
                *("--config", config_file, "--ds_config", ds_config, *overrides, "data.evaluation=[]"),
                *(f"run.folder={run}", f"run.steps={steps}", f"run.save_every={steps}", "run.log_every=5"),
            )
            records = [r for r in read_log(run) if "loss" in r and r["step"] > WARMUP]
        medians = {
            name: statistics.median(record[name] for record in records)
            for name in ("clips_per_second", "step_milliseconds", "data_wait_milliseconds")
        }
        first = rows[0].clips_per_second if rows else medians["clips_per_second"]
        ratio = medians["clips_per_second"] / first
        rows.append(Row(gpus=count, ratio=ratio, memory_gib=records[-1].get("memory_gib"), **medians))
    return rows


def _launch(count: int, *options: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(count))
    code = subprocess.run([*launcher, "--master_port", port, str(PROGRAM), *options]).returncode
    if code:
        sys.exit(code)


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    lines = [f"{'GPUs':>5}{'clips/s':>12}{'ratio':>8}{'ms':>10}{'data ms':>10}{'GiB':>8}"]
    for row in rows:
        memory = "-" if row.memory_gib is None else f"{row.memory_gib:.1f}"
        lines.append(
            f"{row.gpus:>5}{row.clips_per_second:>12.2f}{row.ratio:>8.3f}{row.step_milliseconds:>10.2f}"
            f"{row.data_wait_milliseconds:>10.2f}{memory:>8}"
        )
    return "\n".join(lines)
