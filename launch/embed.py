"""Embeddings of a whole set: python launch/embed.py MODEL --shards 'DIR/*.tar' --output DIR

It can be killed at any moment; the same call goes on where it stopped. DIR/summary.json says how fast it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.loader import EvaluationLoader
from miles_fast.distributed import configure_logging
from miles_fast.evaluation.embedding import fingerprint
from miles_fast.export.embedding_set import (
    Layout,
    SetDescription,
    embed_set,
    unreadable_samples,
)
from miles_fast.export.run import load
from miles_fast.files import write_whole
from miles_fast.models.caption_tokens import SHORTEST, caption_length
from miles_fast.options import at_least
from miles_fast.training.signals import exit_with_status

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an exported or Hugging Face folder, a run, a checkpoint, a .pth")
    parser.add_argument("--tokenizer", help="folder or name, for a .pth, which holds none")
    parser.add_argument("--shards", nargs="+", required=True, help="glob or brace patterns of tars")
    parser.add_argument("--output", required=True, type=Path, help="folder for the parts")
    parser.add_argument("--format", dest="layout", default="npz", choices=get_args(Layout))
    parser.add_argument("--frames", type=at_least(1), help="frames per clip; default: the model's own")
    parser.add_argument(
        "--caption-tokens", type=at_least(SHORTEST), help="default: 32, or all that the model takes"
    )
    parser.add_argument("--batch", type=at_least(1), default=64 if device.type == "cuda" else 16)
    parser.add_argument("--part-size", type=at_least(1), default=16384, help="samples of one file")
    parser.add_argument("--workers", type=at_least(1), default=4, help="reading processes")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16" if device.type == "cuda" else "float32",
        help="of the model",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=device.type == "cuda",
        help="the encoders' layers: a minute first, then faster; default: on a GPU",
    )
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="PREFIX", help="what URLs of shards may start with"
    )
    options = parser.parse_args()
    configure_logging()
    model = load(options.model, tokenizer=options.tokenizer)
    frames = options.frames or model.config.video.num_frames
    most = model.config.text.max_positions
    tokens = caption_length(options.caption_tokens, most, key="--caption-tokens")
    source = SourceConfig(shards=options.shards, name="embed")
    data = DataConfig(
        train=[source],
        frames_per_clip=frames,
        caption_tokens=tokens,
        allowed_prefixes=options.allow,
        decode_workers=options.workers,
    )
    loader = EvaluationLoader(
        source,
        data,
        image_size=model.config.video.image_size,
        tokenizer=model.tokenizer,
        batch=options.batch,
        device=device,
    )
    description = SetDescription(
        model=str(Path(options.model).resolve()),
        fingerprint=fingerprint(model),
        shards=[str(path) for path in loader.shards.paths],
        samples=len(loader),
        frames=frames,
        caption_tokens=tokens,
        dtype=options.dtype,
        layout=options.layout,
        part_size=options.part_size,
    )
    model = model.to(device, DTYPES[options.dtype])
    if options.compile:
        model.compile_layers()
    started, marks = time.perf_counter(), []
    with tqdm(total=len(loader), unit="clip", file=sys.stderr) as bar:
        for done in embed_set(model, loader, options.output, description):
            marks.append((time.perf_counter() - started, done))
            bar.update(done - bar.n)
    bad = unreadable_samples(options.output)
    summary = {
        "clips": len(loader) - len(bad),
        "unreadable": Counter(sample["cause"] for sample in bad),
        "seconds": round(time.perf_counter() - started, 2),
        **speed(marks),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **{name: getattr(options, name) for name in ("batch", "workers", "dtype", "compile")},
    }
    place = options.output / "summary.json"
    # Where an earlier call did it all, its figures stand.
    if marks[0][1] < len(loader) or not place.exists():
        write_whole(place, json.dumps(summary, indent=2) + "\n")
    print(
        f"{options.output}: {summary['clips']} clips, {summary['seconds']} s; "
        f"unreadable: {dict(summary['unreadable']) or 'none'}"
    )
    if summary["clips_per_second"]:
        print(f"{summary['clips_per_second']} clips/s (median); {summary['startup_seconds']} s of start-up")


def speed(marks: Sequence[tuple[float, int]], batches: int = 10) -> dict[str, float | None]:
    """Clips/s of this call, median over stretches of some batches; start-up, up to the first batch, apart.

    `marks` are (seconds, samples encoded so far), the first before any batch. None where there is no second
    batch.
    """
    _, *marks = marks
    step = min(batches, len(marks) - 1)
    stretches = zip(marks, marks[step:], strict=False) if step > 0 else ()
    rates = [(last - first) / (end - start) for (start, first), (end, last) in stretches if end > start]
    return {
        "startup_seconds": round(marks[0][0], 2) if marks else None,
        "clips_per_second": round(statistics.median(rates), 1) if rates else None,
    }


if __name__ == "__main__":
    exit_with_status(main)
