"""README's figures of GPUs, by name: what each was measured with, measured again.

python benchmarks/figures.py                      # every name and its command
python benchmarks/figures.py step-a-128 step-b-96 --shards 'frames/*.tar' [--tokenizer DIR] [--machine h100]

Each is a process of its own, and writes benchmarks/results/MACHINE-NAME.json; the parts of a step write
MACHINE-NAME.txt. Without --tokenizer the text encoder is the config's. Keys of the config may follow.
The exit status is 1 where a figure could not be measured: the others are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
LAUNCH = BENCHMARKS.parent / "launch"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Arguments of throughput.py, clips on each GPU, ZeRO stage, config; `prefix` is what starts Python.

    `zero` is more of DeepSpeed's zero_optimization.
    """

    arguments: str
    clips: int
    stage: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: str = "stage2"
    prefix: tuple[str, ...] = ()


_D = "method.view=D method.mask.ratio=0.75 method.mask.kind=tube_random"
_LOADER = "loader --batches 200 data.jpeg_decoder=nvjpeg"
_VIEWS = {  # name -> (clips, what view A of four frames is changed by)
    "a-128": (128, ""),
    "b-96": (96, "method.view=B"),
    "d-512": (512, _D),
    "d-full-160": (160, f"{_D} method.contrast.clip=full"),
    "one-frame-768": (768, "data.frames_per_clip=1"),
}
_FEW_LIVE = {"stage3_max_live_parameters": 10**8, "stage3_max_reuse_distance": 10**8}
FIGURES = {
    "step-a-128": Figure(clips=128, arguments="step --fp8 --batches 25"),
    "step-a-64": Figure(clips=64, arguments="step --batches 12"),
    "start-a-128": Figure(clips=128, arguments="step --alone --batches 5"),  # warm the second time
    **{
        f"step-{name}": Figure(clips=clips, arguments=f"step --alone --batches 20 {keys}")
        for name, (clips, keys) in _VIEWS.items()
        if keys
    },
    "step-a-192": Figure(clips=192, arguments="step --alone --batches 25"),
    "step-a-512-budget": Figure(
        clips=512, arguments="step --alone --batches 12 run.activation_memory_budget=0.25"
    ),
    "step-a-128-zero2": Figure(clips=128, stage=2, arguments="step --alone --batches 25"),
    "step-ablate-128": Figure(clips=128, arguments="step --ablate --batches 8"),
    **{
        f"step-parts-{name}": Figure(clips=clips, arguments=f"step --profile 4 --batches 8 {keys}")
        for name, (clips, keys) in _VIEWS.items()
    },
    "model-64": Figure(clips=64, arguments="model --batches 20"),
    "model-128": Figure(clips=128, arguments="model --alone --batches 20"),
    "curves-200": Figure(clips=16, arguments="curves --batches 200"),
    "curves-fp8-300": Figure(clips=32, arguments="curves --fp8 --batches 300"),
    "saves": Figure(clips=128, arguments="saves --batches 100 --saves 3 run.compile=false"),
    "loader": Figure(clips=64, arguments=f"{_LOADER} data.decode_workers=8"),
    "loader-4-cores": Figure(
        clips=64,
        arguments=f"{_LOADER} data.decode_workers=3 data.threads=4",
        prefix=("taskset", "-c", "0-3"),
    ),
    "scaling-zero1": Figure(clips=128, arguments="scaling --gpus 1 2 --singles --batches 25"),
    "scaling-zero2": Figure(clips=128, stage=2, arguments="scaling --gpus 1 2 --batches 25"),
    **{
        name: Figure(
            clips=clips,
            stage=stage,
            zero=zero,
            config="vit_h",
            arguments="scaling --gpus 2 --batches 6 model.video.weights=null",
        )
        for name, clips, stage, zero in (
            ("vit-h-zero1", 34, 1, {}),
            ("vit-h-zero3", 34, 3, {}),
            ("vit-h-36-zero3", 36, 3, _FEW_LIVE),
            ("vit-h-36-zero1", 36, 1, {}),  # they do not fit: the report says so
        )
    },
}
_PAGES = ("curves",)  # whose plot is kept beside the json


def command(figure: Figure, ds_config: Path, keys: Sequence[str]) -> list[str]:
    """What measures it, of data and text encoder that `keys` name."""
    arguments = figure.arguments.split()
    files = ["--config", str(LAUNCH / "configs" / f"{figure.config}.yaml"), "--ds_config", str(ds_config)]
    return [
        *(*figure.prefix, sys.executable, str(BENCHMARKS / "throughput.py"), *arguments, *files),
        *("run.init_from=null", *keys),
    ]


def write_ds_config(figure: Figure, path: Path) -> None:
    """launch/ds's of its stage, with its clips and keys."""
    tree = json.loads((LAUNCH / "ds" / f"zero{figure.stage}.json").read_text())
    tree["zero_optimization"] |= figure.zero
    path.write_text(json.dumps(tree | {"train_micro_batch_size_per_gpu": figure.clips}))


def measure(name: str, keys: Sequence[str], stem: str) -> bool:
    """Write `stem`.json (.txt, .html); False where the program failed."""
    figure = FIGURES[name]
    with tempfile.TemporaryDirectory() as folder:
        ds_config = Path(folder, "ds.json")
        write_ds_config(figure, ds_config)
        run = command(figure, ds_config, keys)
        if "--profile" in run:
            printed = subprocess.run(run, stdout=subprocess.PIPE, text=True)
            print(printed.stdout, flush=True)
            if printed.returncode == 0:
                Path(f"{stem}.txt").write_text(printed.stdout)
            return printed.returncode == 0
        kept = ["--json", f"{stem}.json"]
        if figure.arguments.startswith(_PAGES):
            kept += ["--report", f"{stem}.html"]
        return subprocess.run([*run, *kept]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--shards", nargs="+", default=[], metavar="TAR", help="frame shards")
    parser.add_argument("--tokenizer", metavar="DIR", help="of a DistilBERT with fresh weights")
    parser.add_argument("--machine", default="here", help="what the files' names begin with")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results", metavar="DIR")
    options = parser.parse_intermixed_args()
    names = [name for name in options.names if "=" not in name]
    if unknown := sorted(set(names) - set(FIGURES)):
        raise SystemExit(f"no figure is called {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    if not names:
        for name, figure in FIGURES.items():
            keys = "".join(f", {key} {value}" for key, value in figure.zero.items())
            ds_config = Path(f"zero{figure.stage}.json with {figure.clips} clips{keys}")
            print(f"{name}: {shlex.join(command(figure, ds_config, []))}")
        return 0
    if not options.shards:
        raise SystemExit("--shards names the frame shards to measure on (launch/prepare.py makes them)")
    keys = [f"data.train={json.dumps([{'name': 'videos', 'shards': options.shards}])}"]
    if options.tokenizer:
        keys.append(f"model.text={json.dumps({'tokenizer': options.tokenizer})}")
    keys += [name for name in options.names if "=" in name]
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not measure(name, keys, f"{options.output}/{options.machine}-{name}")]
    for name in failed:
        print(f"{name} could not be measured; what its program printed says why", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
