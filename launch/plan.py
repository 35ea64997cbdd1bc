"""What N GPUs will take, from a measured one: python launch/plan.py --measured 1=RUN/log.jsonl

A measurement is a run's log.jsonl, or the --json of benchmarks/throughput.py scaling (or step, of one GPU),
with the same --config and --ds_config. From the smallest further one (2=FILE) comes how long ranks wait for
the slowest; others are compared with what is predicted for them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from miles_fast.config import Config
from miles_fast.config_tree import differences, load_config
from miles_fast.options import above_zero, at_least, number
from miles_fast.training.ds_config import EngineSettings, read_ds_config
from miles_fast.training.planning import (
    Links,
    Measured,
    Plan,
    deciding,
    model_sizes,
    plan,
    rank_spread,
)
from miles_fast.training.progress import read_records

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is planned for, and the files that say so."""

    config: Config
    config_file: str
    settings: EngineSettings
    ds_config: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", nargs="+", required=True, metavar="GPUS=FILE")
    parser.add_argument("--config", default=str(ROOT / "configs" / "stage2.yaml"))
    parser.add_argument("--ds_config", default=str(ROOT / "ds" / "zero1.json"))
    count = at_least(1)
    reached = number(float, lambda share: 0 < share <= 1, "a share above 0, 1 at most")
    hidden = number(float, lambda share: 0 <= share <= 1, "a share from 0 to 1")
    parser.add_argument("--gpus", nargs="+", type=count, default=[1, 2, 8, 16, 64, 256, 1024])
    parser.add_argument("--gpus-per-host", type=count, default=8)
    parser.add_argument("--nvlink", type=above_zero, default=450.0, help="GB/s of a GPU, one direction")
    parser.add_argument("--network", type=above_zero, default=50.0, help="GB/s of a GPU between hosts")
    parser.add_argument("--link-efficiency", type=reached, default=0.75, help="share of it that NCCL reaches")
    parser.add_argument("--hidden", type=hidden, default=0.0, help="share of communication behind the passes")
    parser.add_argument("--vocabulary", type=count, default=30522, help="of the tokenizer")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    settings = read_ds_config(options.ds_config, config, cuda=True, ranks=1)
    planned = Planned(
        config=config, config_file=options.config, settings=settings, ds_config=options.ds_config
    )
    measured = dict(_measurement(text, planned) for text in options.measured)
    if 1 not in measured:
        raise ValueError("--measured: one of them must be of one GPU, 1=FILE")
    sizes = model_sizes(config, options.vocabulary)
    links = Links(
        gpus_per_host=options.gpus_per_host,
        nvlink=options.nvlink,
        network=options.network,
        efficiency=options.link_efficiency,
    )
    frozen = f", {sizes.frozen / 1e6:.1f} M frozen" if sizes.frozen else ""
    print(
        f"{sizes.trained / 1e6:.1f} M parameters{frozen}, {sizes.snapshot / 1e6:.1f} M in the snapshot; ZeRO "
        f"{settings.stage}, {settings.batch} clips x {settings.accumulation} a GPU"
    )
    spread, several = 0.0, min((gpus for gpus in measured if gpus > 1), default=None)
    predict = partial(plan, config, settings, sizes, measured[1], links, hidden=options.hidden)
    if several is None:
        print("ranks are taken to be equally fast: --measured 2=FILE says how much they differ")
    else:
        spread = rank_spread(predict(several), measured[several])
        print(f"ranks' steps differ by {1000 * spread:.1f} ms (standard deviation), from {several} GPUs")
    for gpus in sorted({*options.gpus, *measured}):
        seen = measured.get(gpus) if gpus > 1 else None
        print(_row(predict(gpus, spread=spread), seen, fitted=gpus == several))


def _measurement(text: str, planned: Planned) -> tuple[int, Measured]:
    count, equals, file = text.partition("=")
    if not equals or not count.isdecimal() or not int(count):
        raise ValueError(f"--measured {text}: write GPUS=FILE, as in 1=runs/stage2/log.jsonl")
    gpus, path, settings = int(count), Path(file), planned.settings
    records = _rows(path, gpus, planned) if path.suffix == ".json" else _log(path, gpus, planned)
    if not records:
        raise ValueError(
            f"{path}: holds no clips_per_second above 0 of {gpus} GPUs; name a run's log.jsonl, or the "
            "--json of benchmarks/throughput.py scaling or step"
        )
    speed = statistics.median(record["clips_per_second"] for record in records)
    seconds = settings.batch * settings.accumulation * gpus / speed
    memory = max((r["memory_gib"] for r in records if _is_above_zero(r.get("memory_gib"))), default=None)
    return gpus, Measured(clips_per_second=speed, step_seconds=seconds, memory_gib=memory)


def _rows(path: Path, gpus: int, planned: Planned) -> list[dict[str, Any]]:
    """The row of so many GPUs of what throughput.py wrote."""
    batch = planned.settings.batch
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not json ({error})") from error
    try:
        rows = [row for row in tree.get("scaling", []) if row.get("gpus") == gpus]
        rows = rows or (tree.get("step", [])[:1] if gpus == 1 else [])
        batches = [tree.get("batch", batch), *(row.get("batch", batch) for row in rows)]
        if "config" in tree:  # older files lack it
            _check_config(path, tree["config"], planned)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: not what benchmarks/throughput.py writes ({error}); name the --json of its scaling or "
            "step"
        ) from error
    if other := [measured for measured in batches if measured != batch]:
        raise ValueError(
            f"{path}: measured with {other[0]} clips a GPU, but {planned.ds_config} has "
            f"train_micro_batch_size_per_gpu = {batch}; name the measured one with --ds_config"
        )
    return [row for row in rows if _is_above_zero(row.get("clips_per_second"))]


def _log(path: Path, gpus: int, planned: Planned) -> list[dict[str, Any]]:
    """The records of a run's log that hold its speed, behind compiling and warming up."""
    records = [record for record in read_records(path) if _is_above_zero(record.get("clips_per_second"))]
    records = records[len(records) // 3 :]
    config = path.with_name("config.json")
    if config.is_file():
        _check_config(path, deciding(load_config(config)), planned)
    _check_clips(path, records, gpus, planned)
    return records


def _check_config(path: Path, measured: dict[str, Any], planned: Planned) -> None:
    if changed := differences(measured, deciding(planned.config)):
        raise ValueError(
            f"{path}: measured with another config than {planned.config_file} (measured -> planned): "
            f"{'; '.join(changed)}. Plan with the measured one (--config; a run's is config.json beside its "
            "log), or name a measurement of what is planned"
        )


def _check_clips(path: Path, records: list[dict[str, Any]], gpus: int, planned: Planned) -> None:
    timed = [record for record in records if _is_above_zero(record.get("step_milliseconds"))]
    if not timed:
        return
    clips = round(statistics.median(r["clips_per_second"] * r["step_milliseconds"] / 1000 for r in timed))
    batch, accumulation = planned.settings.batch, planned.settings.accumulation
    if clips != batch * accumulation * gpus:
        raise ValueError(
            f"{path}: measured with {clips} clips a step, but train_micro_batch_size_per_gpu x "
            f"gradient_accumulation_steps of {planned.ds_config} are {batch} x {accumulation} on each of "
            f"{gpus} GPUs; name the measured one with --ds_config, and as many GPUs as that run had"
        )


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _row(found: Plan, seen: Measured | None, *, fitted: bool) -> str:
    memory = "   ?" if found.memory_gib is None else f"{found.memory_gib:6.1f}"
    row = (
        f"{found.gpus:>5} GPUs  memory {memory} GiB (state {found.state_gib:5.1f})  sends "
        f"{found.sent_bytes / 1e9:6.2f} GB in {1000 * found.communication_seconds:6.1f} ms, "
        f"waits {1000 * found.waiting_seconds:5.1f} ms  "
        f"{found.clips_per_second:>10,.0f} clips/s  {100 * found.efficiency:5.1f} %"
    )
    if seen is not None:
        row += f"  measured {seen.clips_per_second:,.0f} clips/s: "
        if fitted:
            row += "the waiting is taken from it"
        else:
            row += f"predicted {_error(found.clips_per_second, seen.clips_per_second)}"
        if found.memory_gib is not None and seen.memory_gib is not None:
            row += f", {seen.memory_gib:.1f} GiB: predicted {_error(found.memory_gib, seen.memory_gib)}"
    return row


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
