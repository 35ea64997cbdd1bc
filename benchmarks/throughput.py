"""Throughput of one machine, as tables: the encoder, whole training steps, the loader, or all three.

python benchmarks/throughput.py model   the video encoder, forward and backward; [--alone]
python benchmarks/throughput.py step    whole steps; [--ablate | --alone | --fp8 | --profile N]
python benchmarks/throughput.py loader  the loader and its stages; [--videos TAR ...]
python benchmarks/throughput.py all     the three of them; [--report PAGE.html [--micro MICRO.json]]
python benchmarks/throughput.py doctor  what holds a run back, and what removes it
python benchmarks/throughput.py decoders --videos TAR ...   the loader by layout and decoder
python benchmarks/throughput.py curves                      the loss as configured and as published; [--fp8]
python benchmarks/throughput.py spoiled                     the loader where samples are unusable
python benchmarks/throughput.py scaling [--gpus 1 2] [--singles]   whole runs on so many GPUs of this host
python benchmarks/throughput.py saves [--saves 4]           what checkpoints cost a run

Each stands beside what people would otherwise use, measured in the same run. Any config: [--config FILE]
[--ds_config FILE] [section.key=value ...]. The exit status is 1 where a row of step failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import curves
import model_speed
import scaling
import torch
import variants
from doctor import examine, report
from driver import held_by_others
from loader_inputs import time_decoders, time_spoiled
from loader_rivals import clips_per_second, torch_dataloader, webdataset_pillow
from loader_stages import WARMUP, measure_loader
from result_page import write_page
from saves import measure_saves
from saves import table as saves_table
from step_parts import host_table, idle_table, parts_of, table

from miles_fast.config import Config
from miles_fast.config_tree import load_config
from miles_fast.data.demo import prepare_demo
from miles_fast.data.shards import expand_shards
from miles_fast.data.sources import open_shards
from miles_fast.distributed import configure_logging, logger
from miles_fast.kernels.dispatch import quack_for
from miles_fast.options import above_zero, at_least
from miles_fast.training.ds_config import EngineSettings, read_ds_config
from miles_fast.training.engine import init_process_group
from miles_fast.training.loop import pretrain
from miles_fast.training.planning import deciding
from miles_fast.training.signals import exit_with_status

ROOT = Path(__file__).resolve().parents[1]


def time_model(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """Rows of the encoder."""
    alone = options.alone and options.what == "model"
    rows = model_speed.measure_encoder(config, settings.batch, options.batches, _device(), alone=alone)
    print(model_speed.table(rows))
    return [asdict(row) for row in rows]


def _ds_tree(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(Path(options.ds_config).read_text())


def _experiment(options: argparse.Namespace, steps: int) -> variants.Experiment:
    return variants.Experiment(
        config_file=options.config,
        overrides=options.overrides,
        ds_tree=_ds_tree(options),
        steps=steps,
    )


def time_step(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """Rows of whole steps: real training runs, their checkpoint included."""
    init_process_group()
    chosen = [variants.CONFIGURED]
    if options.ablate:
        chosen += variants.ablations(options.config, options.overrides)
    elif options.fp8:
        chosen = [variants.BF16, variants.FP8]
    elif not options.alone:
        chosen += variants.BASELINES
    experiment = _experiment(options, options.batches + WARMUP)
    rows = variants.measure_variants(chosen, experiment, fresh=options.what == "step")
    print(variants.table(rows))
    return [asdict(row) for row in rows]


def profile_step(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """Milliseconds of GPU time by part over the last steps; prints the longest kernels of each."""
    init_process_group()
    num_steps = options.profile
    steps = options.batches + WARMUP + num_steps
    with tempfile.TemporaryDirectory() as folder:
        run = [f"run.steps={steps}", f"run.folder={folder}/run", "run.log_every=5"]
        run += ["run.evaluate_every=1", "run.patience=0"]
        config = load_config(options.config, [*options.overrides, *run])
        settings = read_ds_config(options.ds_config, config, cuda=torch.cuda.is_available(), ranks=1)
        schedule = torch.profiler.schedule(wait=0, warmup=steps - num_steps, active=num_steps, repeat=1)
        with torch.profiler.profile(schedule=schedule, acc_events=True) as profile:
            # In-loop evaluation is the one thing that is called after every step.
            pretrain(config, settings, evaluate=lambda *_: profile.step() or {})
    parts = parts_of(profile, num_steps)
    print(table(parts))
    print(idle_table(profile, num_steps))
    print(host_table(profile, num_steps))
    return {part.name: part.milliseconds for part in parts}


def compare_curves(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """The loss of `--batches` steps as configured, and as published in fp32 and bf16."""
    init_process_group()
    found = curves.measure_curves(_experiment(options, options.batches))
    print(curves.table(found))
    return found


def compare_fp8(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """The loss of `--batches` steps in bf16, in bf16 with another seed, and in fp8, and their distances."""
    init_process_group()
    chosen = curves.fp8_and_seeds(options.config, options.overrides)
    found = curves.measure_curves(_experiment(options, options.batches), chosen)
    distances = curves.spread(found)
    print(curves.table(found))
    print(curves.verdict(distances))
    return {"losses": found, **asdict(distances), "within": distances.within}


def time_loader(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """The loader, its stages, and what people would otherwise use, on this machine and these shards."""
    shards, workers = open_shards(config.data.train[0], config.data), config.data.decode_workers
    rivals = {}
    if shards.cache is None and shards[0].layout() == "frames":  # the rivals read local files
        rivals["webdataset_pillow"] = webdataset_pillow(shards.paths, config, settings.batch, workers)
    if options.videos:
        videos = expand_shards(options.videos)
        rivals["torch_dataloader_pyav"] = torch_dataloader(videos, config, settings.batch, workers)
    figures = asdict(measure_loader(config, settings.batch, options.batches, _device()))
    for name, rival in rivals.items():
        figures[f"{name}_clips_per_second"] = clips_per_second(rival, settings.batch, options.rival_seconds)
    return _printed(figures)


def diagnose(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """The doctor's measurements and verdict."""
    with tempfile.TemporaryDirectory() as folder:
        run = [f"run.steps={options.batches + WARMUP}", f"run.folder={folder}/run", "run.log_every=5"]
        config = load_config(options.config, [*options.overrides, *run])
        settings = read_ds_config(options.ds_config, config, cuda=torch.cuda.is_available(), ranks=1)
        found = examine(config, settings, options.batches, init_process_group())
    print(report(found, config, settings.batch))
    return asdict(found)


def compare_decoders(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """The loader by layout and decoder."""
    if not options.videos:
        raise SystemExit("decoders compares decoders on mp4 shards: --videos 'DIR/*.tar'")
    with tempfile.TemporaryDirectory() as folder:
        kept = options.prepared or Path(folder)
        seconds = options.rival_seconds
        return time_decoders(config, settings.batch, seconds, options.videos, kept, _device())


def spoil(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """The loader where a share of the samples is unusable."""
    with tempfile.TemporaryDirectory() as folder:
        return _printed(time_spoiled(config, settings.batch, options.batches, Path(folder), _device()))


def scale(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """Rows of whole runs, one for each number of GPUs."""
    steps = options.batches + WARMUP
    files = options.config, options.ds_config, options.overrides
    print(scaling.HEAD, flush=True)
    rows = []
    for row in scaling.measure_scaling(options.gpus, *files, steps, singles=options.singles):
        print(scaling.line(row), flush=True)  # a run takes minutes, and the next may fail
        rows.append(asdict(row))
    return rows


def time_saves(config: Config, settings: EngineSettings, options: argparse.Namespace) -> Any:
    """A run's steps beside its checkpoints, against its other steps."""
    init_process_group()
    tree = _ds_tree(options)
    found = measure_saves(options.config, options.overrides, tree, options.batches, options.saves)
    print(saves_table(found))
    return asdict(found)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "model": time_model,
    "step": time_step,
    "loader": time_loader,
    "doctor": diagnose,
    "curves": compare_curves,
    "decoders": compare_decoders,
    "spoiled": spoil,
    "scaling": scale,
    "saves": time_saves,
}


def read_micro(file: Path | None) -> dict[str, Any]:
    """micro.py's figures, if any. Raises ValueError where the file holds something else."""
    try:
        micro = json.loads(file.read_bytes()) if file else {}
    except ValueError as error:
        raise ValueError(f"{file}: not json ({error}); name the --json of benchmarks/micro.py") from error
    if not isinstance(micro, dict) or (file and "timings" not in micro):
        raise ValueError(f"{file}: holds no timings; name the --json of benchmarks/micro.py")
    return micro


def arguments() -> argparse.ArgumentParser:
    """What this program takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*PROGRAMS, "all"])
    parser.add_argument("--config", default=str(ROOT / "launch" / "configs" / "demo.yaml"))
    parser.add_argument("--ds_config", default=str(ROOT / "ds.json"))
    count = at_least(1)
    parser.add_argument("--batches", type=count, default=50, help="batches, passes or steps that are timed")
    parser.add_argument(
        "--videos",
        nargs="+",
        default=[],
        metavar="TAR",
        help="mp4 shards: loader gives them to torch's DataLoader, decoders prepares them in each way",
    )
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="decoders: keep what is prepared here")
    parser.add_argument("--rival-seconds", type=above_zero, default=10.0, help="for each rival or decoder")
    parser.add_argument("--gpus", nargs="+", type=count, default=[1, 2], metavar="N", help="for scaling")
    parser.add_argument(
        "--singles", action="store_true", help="for scaling: each GPU alone too, all at the same time"
    )
    parser.add_argument("--saves", type=count, default=4, help="saves: so many among the --batches steps")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--alone", action="store_true", help="step, model: nothing beside it")
    beside.add_argument("--ablate", action="store_true", help="step: each optimisation switched off in turn")
    beside.add_argument(
        "--fp8",
        action="store_true",
        help="step, curves: the linear layers in bf16 and fp8; curves: and in bf16 with another seed",
    )
    beside.add_argument(
        "--profile", type=count, default=0, metavar="N", help="what N steps more consist of; step: instead"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="also draw them on a html page")
    parser.add_argument(
        "--micro", type=Path, metavar="JSON", help="micro.py's figures, whose roofline --report draws"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def main() -> int:
    options = arguments().parse_intermixed_args()
    configure_logging()
    micro = read_micro(options.micro)
    for file in filter(None, (options.json, options.report)):
        file.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(options.config, options.overrides)
    settings = read_ds_config(options.ds_config, config, cuda=torch.cuda.is_available(), ranks=1)
    if config.data.demo_corpus:
        prepare_demo(Path(config.data.demo_corpus))
    held = held_by_others(max(options.gpus) if options.what == "scaling" else 1)
    for gpu, gib in held.items():
        logger.warning("GPU %d is not idle: others hold %.1f GiB of it, and share its time", gpu, gib)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    # A run without it, which only a warning tells of, is slower by more than most of what is measured here.
    quack = torch.cuda.is_available() and quack_for(torch.device("cuda")) is not None
    head = {"machine": machine, "torch": torch.__version__, "batch": settings.batch, "quack": quack}
    head |= {"held_by_others_gib": held} if held else {}
    head["config"] = deciding(config)  # for launch/plan.py, which compares it with what is planned
    products = ", products by quack" if quack else ""
    print(f"{options.what} on {machine}, batch {settings.batch}, torch {torch.__version__}{products}")
    runs = {options.what: PROGRAMS.get(options.what)}
    if options.what == "all":
        runs = {name: PROGRAMS[name] for name in ("model", "step", "loader")}
        if options.profile:
            runs["parts"] = profile_step
    elif options.what == "step" and options.profile:
        runs = {"parts": profile_step}
    elif options.what == "curves" and options.fp8:
        runs = {"fp8": compare_fp8}
    figures = {}
    for key, run in runs.items():
        figures[key] = run(config, settings, options)
        if options.json:
            options.json.write_text(json.dumps({**head, **figures}, indent=2) + "\n")
    if options.report:
        write_page(options.report, head, {**figures, "micro": micro})
    return int(any("error" in row for row in figures.get("step", [])))


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _printed(figures: dict[str, Any]) -> dict[str, Any]:
    for name, value in figures.items():
        print(f"{name:<40}" + (f"{value:>12.3f}" if isinstance(value, int | float) else f"{value:>12}"))
    return figures


if __name__ == "__main__":
    exit_with_status(lambda: sys.exit(main()))
