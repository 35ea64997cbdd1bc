"""Throughput of one machine, as a table: the loader alone, or whole training steps fed by it.

python benchmarks/throughput.py loader [--config FILE] [section.key=value ...]
python benchmarks/throughput.py step   [--config FILE] [section.key=value ...]
python benchmarks/throughput.py doctor [--config FILE] [section.key=value ...]   what holds a run back
python benchmarks/throughput.py decoders --videos TAR ...   the loader by layout and decoder
python benchmarks/throughput.py spoiled   the loader where a share of the samples is unusable
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from doctor import examine, report
from loader_inputs import time_decoders, time_spoiled
from loader_rivals import clips_per_second, torch_dataloader, webdataset_pillow
from loader_stages import WARMUP, measure_loader
from step_parts import host_table, parts_of, table

from miles_fast.config import Config, load_config
from miles_fast.data.demo import prepare_demo
from miles_fast.data.shards import expand_shards
from miles_fast.data.sources import open_shards
from miles_fast.distributed import configure_logging
from miles_fast.training.engine import init_process_group, read_ds_config
from miles_fast.training.loop import pretrain
from miles_fast.training.progress import read_log

ROOT = Path(__file__).resolve().parents[1]


def time_loader(
    config: Config,
    batch: int,
    batches: int,
    videos: list[str],
    rival_seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """The loader, its stages, and what people would otherwise use, on this machine and these shards."""
    shards, workers = open_shards(config.data.train[0], config.data), config.data.decode_workers
    rivals = {}
    if shards.cache is None and shards[0].layout() == "frames":  # the rivals read local files
        rivals["webdataset_pillow"] = webdataset_pillow(shards.paths, config, batch, workers)
    if videos:
        rivals["torch_dataloader_pyav"] = torch_dataloader(expand_shards(videos), config, batch, workers)
    figures = asdict(measure_loader(config, batch, batches, device))
    for name, rival in rivals.items():
        figures[f"{name}_clips_per_second"] = clips_per_second(rival, batch, rival_seconds)
    return figures


def measure_step(config: Config, settings: Any) -> dict[str, Any]:
    """Medians over the run's log records after the warm-up: a real training run, its checkpoint included."""
    pretrain(config, settings)
    records = [r for r in read_log(Path(config.run.folder)) if "loss" in r and r["step"] > WARMUP]
    names = ("clips_per_second", "step_milliseconds", "data_wait_milliseconds", "mfu", "memory_gib")
    return {n: statistics.median(r[n] for r in records) for n in names if all(n in r for r in records)}


def profile_step(config: Config, settings: Any, num_steps: int) -> dict[str, Any]:
    """Milliseconds of GPU time by part over the last steps; prints the longest kernels of each."""
    schedule = torch.profiler.schedule(
        wait=0, warmup=config.run.steps - num_steps, active=num_steps, repeat=1
    )
    with torch.profiler.profile(schedule=schedule, acc_events=True) as profile:
        # In-loop evaluation is the one thing that is called after every step.
        pretrain(config, settings, evaluate=lambda *_: profile.step() or {})
    parts = parts_of(profile, num_steps)
    print(table(parts))
    print(host_table(profile, num_steps))
    return {f"{part.name} ms": part.milliseconds for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loader", "step", "doctor", "decoders", "spoiled"])
    parser.add_argument("--config", default=str(ROOT / "launch" / "configs" / "demo.yaml"))
    parser.add_argument("--ds_config", default=str(ROOT / "ds.json"))
    parser.add_argument("--batches", type=int, default=50, help="batches of the loader, and steps")
    parser.add_argument(
        "--videos",
        nargs="+",
        default=[],
        metavar="TAR",
        help="mp4 shards: loader gives them to torch's DataLoader, decoders prepares them in each way",
    )
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="decoders: keep what is prepared here")
    parser.add_argument("--rival-seconds", type=float, default=10.0, help="loader: time for each rival")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="step: no timing, but what the last STEPS consist of",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    configure_logging()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        steps = options.batches + WARMUP + options.profile
        run = [f"run.steps={steps}", f"run.folder={folder}/run", "run.log_every=5"]
        if options.profile:
            run.append("run.evaluate_every=1")
        config = load_config(options.config, [*options.overrides, *run])
        settings = read_ds_config(options.ds_config, config, cuda=torch.cuda.is_available(), ranks=1)
        if config.data.demo_corpus:
            prepare_demo(Path(config.data.demo_corpus))
        if options.what == "loader":
            figures = time_loader(
                config, settings.batch, options.batches, options.videos, options.rival_seconds, device
            )
        elif options.what == "decoders":
            if not options.videos:
                parser.error("decoders compares decoders on mp4 shards: --videos 'DIR/*.tar'")
            kept = options.prepared or Path(folder)
            figures = time_decoders(config, settings.batch, options.batches, options.videos, kept, device)
        elif options.what == "spoiled":
            figures = time_spoiled(config, settings.batch, options.batches, Path(folder), device)
        elif options.what == "doctor":
            found = examine(config, settings, options.batches, init_process_group())
            print(report(found, config, settings.batch))
            figures = asdict(found)
        else:
            init_process_group()
            figures = (
                profile_step(config, settings, options.profile)
                if options.profile
                else measure_step(config, settings)
            )
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{options.what} on {machine}, batch {settings.batch}, torch {torch.__version__}")
    if options.what != "doctor":  # which has printed a table of its own
        for name, value in figures.items():
            print(f"{name:<40}" + (f"{value:>12.3f}" if isinstance(value, int | float) else f"{value:>12}"))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "batch": settings.batch, **figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
