"""F11: a long run of the tiny model with its loaders and saves; how memory grows, in MiB per 1,000 steps.

python tests/faults/soak.py [--steps 20000] [--json FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny import ds_tree, tiny_config, write_data  # noqa: E402

from miles_fast.data.loader import Loader  # noqa: E402
from miles_fast.training.engine import check_ds_config, init_process_group  # noqa: E402
from miles_fast.training.loop import pretrain  # noqa: E402


def resident_mib() -> float:
    """Memory that this process and its reading processes hold in RAM, shared pages counted once."""
    total = 0
    children = Path("/proc/self/task").glob("*/children")
    pids = ["self", *(pid for path in children for pid in path.read_text().split())]
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def soak(root: Path, steps: int, every: int) -> dict[str, float]:
    """Train; sample memory every so many steps; slopes over all but the first fifth."""
    write_data(root)
    run = {"folder": str(root / "run"), "steps": steps, "log_every": 20, "save_every": max(steps // 40, 1)}
    config = tiny_config(root, run=run)
    cuda = torch.cuda.is_available()
    settings = check_ds_config(ds_tree(stage=1, batch=4, bf16=cuda), "ds", config, cuda=cuda, ranks=1)
    samples = []

    def deal(loader, first_step):
        for number, batch in enumerate(Loader.batches(loader, first_step)):
            if number % every == 0:
                device = torch.cuda.memory_allocated() / 2**20 if cuda else 0.0
                samples.append((number, resident_mib(), device))
            yield batch

    init_process_group()
    began = time.monotonic()
    pretrain(config, settings, deal=deal)
    seconds = time.monotonic() - began
    settled = np.array(samples[len(samples) // 5 :])
    slopes = [1000 * np.polyfit(settled[:, 0], settled[:, column], 1)[0] for column in (1, 2)]
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "resident_mib_first": round(float(settled[0, 1]), 1),
        "resident_mib_last": round(float(settled[-1, 1]), 1),
        "resident_mib_per_1000_steps": round(float(slopes[0]), 3),
        "device_mib_per_1000_steps": round(float(slopes[1]), 3),
        "saves": 40,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.steps, max(options.steps // 400, 1))
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    grown = max(found["resident_mib_per_1000_steps"], found["device_mib_per_1000_steps"])
    if grown > 1.0:
        sys.exit(f"error: memory grows by {grown:.2f} MiB per 1,000 steps")


if __name__ == "__main__":
    main()
