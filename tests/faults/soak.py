"""F11: a long run of the tiny model with its loaders and saves; how memory grows, in MiB per 1,000 steps.

python tests/faults/soak.py [--steps 20000 | --minutes 10] [--shards PATTERN ...] [--batch 4] [--json FILE]
    [section.key=value ...]

It trains on a mixture of frames, a second set of frames and videos, all generated; with --shards on those.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from tiny import ds_tree, tiny_tree, write_data, write_frames  # noqa: E402

from miles_fast.config import Config  # noqa: E402
from miles_fast.config_tree import load_config  # noqa: E402
from miles_fast.data.demo_corpus import Recipe, build_demo_corpus  # noqa: E402
from miles_fast.data.loader import Loader  # noqa: E402
from miles_fast.training.ds_config import check_ds_config  # noqa: E402
from miles_fast.training.engine import init_process_group  # noqa: E402
from miles_fast.training.loop import pretrain  # noqa: E402
from miles_fast.training.saving import Saver  # noqa: E402
from miles_fast.training.signals import Stopped  # noqa: E402

SAVES = 40
SAMPLES = 400
ENDLESS = 10**7
MEASURED = ("resident", "allocated", "reserved", "device")


def memory_mib() -> tuple[float, ...]:
    """Of this process and its readers in RAM, of torch in use and held on the GPU, of all there."""
    if not torch.cuda.is_available():
        return resident_mib(), 0.0, 0.0, 0.0
    free, total = torch.cuda.mem_get_info()  # what nvidia-smi shows: DALI's and the driver's, too
    device = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free
    return resident_mib(), *(held / 2**20 for held in device)


def resident_mib() -> float:
    """Memory of their own that this process and its reading processes hold in RAM, shared pages counted once.

    Not that of files: their part of a library falls and rises with whatever else on the machine maps it.
    """
    total = 0
    children = Path("/proc/self/task").glob("*/children")
    pids = ["self", *(pid for path in children for pid in path.read_text().split())]
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def generated_sources(root: Path) -> list[dict]:
    """Frames, a second set of them, and videos as video2dataset leaves them."""
    write_frames(root / "second", 12, shards=1)
    corpus = build_demo_corpus(root / "demo", Recipe(num_train=6, num_heldout=1), workers=1)
    return [
        {"name": "first", "shards": [str(root / "train" / "*.tar")], "weight": 2},
        {"name": "second", "shards": [str(root / "second" / "*.tar")], "weight": 1},
        {"name": "videos", "shards": [str(path) for path in corpus.train_tars], "weight": 0.1},
    ]


def configure(root: Path, options: argparse.Namespace) -> Config:
    """The tiny model's config over the data, with the overrides."""
    write_data(root)
    tree = tiny_tree(root)
    steps = ENDLESS if options.minutes else options.steps
    saves = 500 if options.minutes else max(steps // SAVES, 1)
    tree["run"] = {"folder": str(root / "run"), "steps": steps, "log_every": 20, "save_every": saves}
    given = [{"shards": [pattern], "name": pattern} for pattern in options.shards]
    tree["data"] |= {"train": given or generated_sources(root)}
    (root / "soak.yaml").write_text(yaml.safe_dump(tree))
    return load_config(root / "soak.yaml", options.overrides)


def soak(config: Config, batch: int, minutes: float | None) -> dict[str, float]:
    """Train and sample memory; slopes over all but the first fifth."""
    cuda = torch.cuda.is_available()
    settings = check_ds_config(ds_tree(stage=1, batch=batch, bf16=cuda), "ds", config, cuda=cuda, ranks=1)
    every = 10 if minutes else max(config.run.steps // SAMPLES, 1)
    samples, written, publish = [], [], Saver._publish

    def counted(saver, name):
        publish(saver, name)
        written.append(name)

    def deal(loader, first_step):
        end = time.monotonic() + 60 * (minutes or 0)
        for number, batch in enumerate(Loader.batches(loader, first_step)):
            if number % every == 0:
                samples.append((number, *memory_mib()))
                if minutes and number and time.monotonic() > end:
                    os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    Saver._publish = counted
    init_process_group()
    began = time.monotonic()
    try:
        pretrain(config, settings, deal=deal)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    seconds = time.monotonic() - began
    settled = np.array(samples[len(samples) // 5 :])
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "steps": int(written[-1].removeprefix("step-")),
        "seconds": round(seconds, 1),
        "saves": len(written),
    }
    for column, name in enumerate(MEASURED, 1):
        found[f"{name}_mib_first"] = round(float(settled[0, column]), 1)
        found[f"{name}_mib_last"] = round(float(settled[-1, column]), 1)
        slope = 1000 * np.polyfit(settled[:, 0], settled[:, column], 1)[0]
        found[f"{name}_mib_per_1000_steps"] = round(float(slope), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, help="end then, with a checkpoint, instead of after steps")
    parser.add_argument("--shards", nargs="+", default=[], help="train on these; each pattern is a set")
    parser.add_argument("--batch", type=int, default=4, help="clips a step")
    parser.add_argument("--limit", type=float, default=1.0, help="MiB per 1,000 steps that are an error")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(configure(Path(folder), options), options.batch, options.minutes)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    name = max(MEASURED, key=lambda name: found[f"{name}_mib_per_1000_steps"])
    if (grown := found[f"{name}_mib_per_1000_steps"]) > options.limit:
        sys.exit(f"error: {name} memory grows by {grown:.2f} MiB per 1,000 steps")


if __name__ == "__main__":
    main()
