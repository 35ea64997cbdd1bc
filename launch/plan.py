"""What N GPUs will take, from a measured one: python launch/plan.py --measured 1=RUN/log.jsonl

A measurement is a run's log.jsonl, or the --json of benchmarks/throughput.py scaling (or step, of one GPU),
with the same --config and --ds_config. From the smallest further one (2=FILE) comes how long ranks wait for
the slowest; others are compared with what is predicted for them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from miles_fast.config import load_config
from miles_fast.training.ds_config import EngineSettings, read_ds_config
from miles_fast.training.planning import Links, Measured, Plan, model_sizes, plan, rank_spread

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", nargs="+", required=True, metavar="GPUS=FILE")
    parser.add_argument("--config", default=str(ROOT / "configs" / "stage2.yaml"))
    parser.add_argument("--ds_config", default=str(ROOT / "ds" / "zero1.json"))
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 8, 16, 64, 256, 1024])
    parser.add_argument("--gpus-per-host", type=int, default=8)
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s of a GPU, one direction")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s of a GPU between hosts")
    parser.add_argument("--link-efficiency", type=float, default=0.75, help="share of it that NCCL reaches")
    parser.add_argument("--hidden", type=float, default=0.0, help="share of communication behind the passes")
    parser.add_argument("--vocabulary", type=int, default=30522, help="of the tokenizer")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    settings = read_ds_config(options.ds_config, config, cuda=True, ranks=1)
    measured = dict(_measurement(text, settings, options.ds_config) for text in options.measured)
    if 1 not in measured:
        raise ValueError("--measured: one of them must be of one GPU, 1=FILE")
    sizes = model_sizes(config, options.vocabulary)
    links = Links(
        gpus_per_host=options.gpus_per_host,
        nvlink=options.nvlink,
        network=options.network,
        efficiency=options.link_efficiency,
    )
    print(
        f"{sizes.trained / 1e6:.1f} M parameters, {sizes.snapshot / 1e6:.1f} M in the snapshot; ZeRO "
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


def _measurement(text: str, settings: EngineSettings, ds_config: str) -> tuple[int, Measured]:
    gpus, equals, file = text.partition("=")
    if not equals or not gpus.isdigit() or not int(gpus):
        raise ValueError(f"--measured {text}: write GPUS=FILE, as in 1=runs/stage2/log.jsonl")
    text, batch = Path(file).read_text(), settings.batch
    try:
        if Path(file).suffix == ".json":
            tree = json.loads(text)
            batch = tree.get("batch", batch)
            scaling = [row for row in tree.get("scaling", []) if row["gpus"] == int(gpus)]
            records = scaling or (tree.get("step", [])[:1] if gpus == "1" else [])
        else:
            records = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ValueError(f"{file}: not json ({error})") from error
    if batch != settings.batch:
        raise ValueError(
            f"{file}: measured with {batch} clips a GPU, but {ds_config} has "
            f"train_micro_batch_size_per_gpu = {settings.batch}; name the measured one with --ds_config"
        )
    records = [r for r in records if "clips_per_second" in r]
    steady = records[len(records) // 3 :]  # behind compiling and warming up
    if not steady:
        raise ValueError(
            f"{file}: holds no clips_per_second of {gpus} GPUs; name a run's log.jsonl, or the --json of "
            "benchmarks/throughput.py scaling or step"
        )
    speed = statistics.median(r["clips_per_second"] for r in steady)
    memory = max((r["memory_gib"] for r in steady if r.get("memory_gib") is not None), default=None)
    seconds = settings.batch * settings.accumulation * int(gpus) / speed
    return int(gpus), Measured(clips_per_second=speed, step_seconds=seconds, memory_gib=memory)


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
