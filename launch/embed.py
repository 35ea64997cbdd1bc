"""Embeddings of a whole set: python launch/embed.py MODEL --shards 'DIR/*.tar' --output DIR

It can be killed at any moment; the same call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.loader import EvaluationLoader
from miles_fast.distributed import configure_logging
from miles_fast.export.embedding_set import Layout, SetDescription, embed_set, fingerprint, read_set
from miles_fast.export.run import load
from miles_fast.training.signals import exit_with_status

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an exported or Hugging Face folder, a run or a checkpoint")
    parser.add_argument("--shards", nargs="+", required=True, help="glob or brace patterns of tars")
    parser.add_argument("--output", required=True, type=Path, help="folder for the parts")
    parser.add_argument("--format", dest="layout", default="npz", choices=get_args(Layout))
    parser.add_argument("--frames", type=int, help="frames per clip; default: the model's own")
    parser.add_argument("--caption-tokens", type=int, help="default: 32, or all that the model takes")
    parser.add_argument("--batch", type=int, default=64 if device.type == "cuda" else 16)
    parser.add_argument("--part-size", type=int, default=16384, help="samples of one file")
    parser.add_argument("--workers", type=int, default=4, help="reading processes")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16" if device.type == "cuda" else "float32",
        help="of the model",
    )
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="PREFIX", help="what URLs of shards may start with"
    )
    options = parser.parse_args()
    for name in ("batch", "part_size", "workers"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    configure_logging()
    model = load(options.model)
    frames = options.frames or model.config.video.num_frames
    most = model.config.text.max_positions
    tokens = min(32, most) if options.caption_tokens is None else options.caption_tokens
    if not 3 <= tokens <= most:
        raise ValueError(f"--caption-tokens {tokens}: this model takes 3 to {most}")
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
    started = time.perf_counter()
    with tqdm(total=len(loader), unit="clip", file=sys.stderr) as bar:
        for done in embed_set(model, loader, options.output, description):
            bar.update(done - bar.n)
    seconds, found = time.perf_counter() - started, read_set(options.output)
    causes = Counter(sample["cause"] for sample in found.unreadable)
    print(f"{options.output}: {len(found.keys)} clips, {seconds:.1f} s; unreadable: {dict(causes) or 'none'}")


if __name__ == "__main__":
    exit_with_status(main)
