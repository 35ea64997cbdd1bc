"""Throughput of one machine, as a table: the loader alone, or whole training steps fed by it.

python benchmarks/throughput.py loader [--config FILE] [section.key=value ...]
python benchmarks/throughput.py step   [--config FILE] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step_parts import host_table, parts_of, table

from miles_fast.config import Config, load_config
from miles_fast.data.batches import Quarantine
from miles_fast.data.demo import prepare_demo
from miles_fast.data.loader import Loader
from miles_fast.data.order import Share
from miles_fast.distributed import configure_logging
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.engine import init_process_group, read_ds_config
from miles_fast.training.loop import pretrain
from miles_fast.training.progress import read_log

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 5


def measure_loader(config: Config, batch: int, batches: int) -> dict[str, Any]:
    """Clips/s of the loader with nothing behind it, over `batches` batches after a warm-up."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    loader = Loader(
        config.data,
        image_size=config.model.video.image_size,
        tokenizer=load_tokenizer(config.model.text.tokenizer_source),
        share=Share(batch=batch),
        seed=config.run.seed,
        device=device,
        quarantine=Quarantine(None),
    )
    with contextlib.closing(loader.batches(0)) as stream:
        for _ in range(WARMUP):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
    clips = batch * batches / seconds
    return {"clips_per_second": clips, "images_per_second": clips * config.data.frames_per_clip}


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
    parser.add_argument("what", choices=["loader", "step"])
    parser.add_argument("--config", default=str(ROOT / "launch" / "configs" / "demo.yaml"))
    parser.add_argument("--ds_config", default=str(ROOT / "ds.json"))
    parser.add_argument("--batches", type=int, default=50, help="batches of the loader, or steps")
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
            figures = measure_loader(config, settings.batch, options.batches)
        else:
            init_process_group()
            figures = (
                profile_step(config, settings, options.profile)
                if options.profile
                else measure_step(config, settings)
            )
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{options.what} on {machine}, batch {settings.batch}, torch {torch.__version__}")
    for name, value in figures.items():
        print(f"{name:<24}{value:>12.3f}")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "batch": settings.batch, **figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
