"""Measure a model: retrieval on shards, or a benchmark by its pinned protocol.

python launch/evaluate.py MODEL --shards 'DIR/*.tar'
python launch/evaluate.py MODEL --protocol msrvtt_1ka --data MSRVTT   # or torchrun --nproc_per_node 8 ...
python launch/evaluate.py MODEL --protocol ucf101 --data UCF101 --probe
python launch/evaluate.py --protocol msrvtt_1ka --about               # where its files come from
python launch/evaluate.py --protocol didemo --data DIDEMO --part train --list train.json   # for prepare.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.loader import EvaluationLoader
from miles_fast.distributed import configure_logging, rank
from miles_fast.evaluation.benchmark import measure, measure_probe, table
from miles_fast.evaluation.data_folder import DataFolder, MissingVideosError
from miles_fast.evaluation.embedding import Embedder, default_cache
from miles_fast.evaluation.protocol import Protocol
from miles_fast.evaluation.protocols import NAMES, find_protocol
from miles_fast.evaluation.retrieval import evaluate_retrieval
from miles_fast.evaluation.retrieval import table as retrieval_table
from miles_fast.export.run import load
from miles_fast.models.caption_tokens import SHORTEST, caption_length
from miles_fast.options import at_least, refuse_unused
from miles_fast.training.engine import init_process_group

_OF_PROTOCOLS = (
    *("data", "workers", "cache", "no_cache", "allow_missing", "probe", "dual_softmax"),
    *("about", "part", "list"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", help="an exported or Hugging Face folder, a run, a checkpoint, a .pth"
    )
    parser.add_argument("--tokenizer", help="folder or name, for a .pth, which holds none")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shards", nargs="+", help="glob or brace patterns of tars")
    what.add_argument("--protocol", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--frames", type=at_least(1), help="frames per clip; default: 4, or the protocol's")
    parser.add_argument(
        "--caption-tokens",
        type=at_least(SHORTEST),
        help="default: 32 or the protocol's, or the model's most",
    )
    parser.add_argument("--batch", type=at_least(1), default=32)
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="PREFIX", help="what URLs of shards may start with"
    )
    parser.add_argument("--json", type=Path, help="also write the metrics here")
    parser.add_argument("--data", metavar="ROOT", help="folder of the data set: annotations and videos")
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count() or 1, help="decoding processes a rank"
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder of embeddings made before"
    )
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write it")
    parser.add_argument("--allow-missing", action="store_true", help="measure the videos that are there")
    parser.add_argument("--probe", action="store_true", help="fit a linear probe on the training part")
    parser.add_argument("--dual-softmax", action="store_true", help="score with all test queries at hand")
    parser.add_argument("--about", action="store_true", help="print the protocol and stop")
    parser.add_argument("--part", choices=("train", "val", "test"), default="test", help="of --list")
    parser.add_argument(
        "--list", type=Path, help="write {video file: captions} for launch/prepare.py and stop"
    )
    options = parser.parse_args()
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: no such folder")  # not after an hour of measuring
    if options.shards:
        refuse_unused(parser, options, _OF_PROTOCOLS, "with --shards, only with --protocol")
        on_shards(options)
        return
    refuse_unused(parser, options, ("allow",), "with --protocol, only with --shards")
    protocol = find_protocol(options.protocol)
    if options.about:
        print(protocol.about())
        return
    if options.list:
        write_list(protocol, options)
        return
    if options.frames:
        protocol = replace(protocol, frames=(options.frames,))
    on_videos(protocol, options)


def on_videos(protocol: Protocol, options: argparse.Namespace) -> None:
    """A protocol, or a probe of its features, on the videos of a data set."""
    if not options.model or not options.data:
        raise ValueError("name the model and its data: MODEL --protocol NAME --data ROOT")
    folder = DataFolder(options.data, allow_missing=options.allow_missing)
    device = init_process_group()
    configure_logging()
    model = load(options.model, str(device), tokenizer=options.tokenizer)
    if options.caption_tokens:
        most = model.config.text.max_positions
        length = caption_length(options.caption_tokens, most, key="--caption-tokens")
        protocol = replace(protocol, caption_tokens=length)
    embedder = Embedder(
        model=model,
        device=device,
        batch=options.batch,
        num_workers=options.workers,
        cache=None if options.no_cache else options.cache,
    )
    if options.probe:
        result = measure_probe(protocol, folder, embedder, max(protocol.frames))
    else:
        result = measure(protocol, folder, embedder, dual=options.dual_softmax)
    if rank() == 0:
        print(table(result))
        print(protocol.reported_lines())
        if options.json:
            options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


def write_list(protocol: Protocol, options: argparse.Namespace) -> None:
    """A part of a retrieval protocol as a caption file, paths relative to --data."""
    if protocol.task != "retrieval":
        raise ValueError(f"--list is for retrieval; {protocol.name} is {protocol.task}")
    if not options.data:
        raise ValueError("--list needs --data ROOT")
    folder = DataFolder(options.data, allow_missing=options.allow_missing)
    split, files = protocol.split(folder, options.part)
    listed = {
        os.path.relpath(file.path, folder.root): said
        for file, said in zip(files, split.captions, strict=True)
    }
    options.list.write_text(json.dumps(listed, indent=1) + "\n")
    print(f"{options.list}: {len(listed)} videos of {protocol.name} {options.part}")


def on_shards(options: argparse.Namespace) -> None:
    """Retrieval with the first caption of each clip."""
    if not options.model:
        raise ValueError("name the model: launch/evaluate.py MODEL --shards ...")
    configure_logging()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load(options.model, str(device), tokenizer=options.tokenizer)
    source = SourceConfig(shards=options.shards, name="evaluation")
    data = DataConfig(
        train=[source],
        frames_per_clip=options.frames or 4,
        caption_tokens=caption_length(
            options.caption_tokens, model.config.text.max_positions, key="--caption-tokens"
        ),
        allowed_prefixes=options.allow,
    )
    loader = EvaluationLoader(
        source,
        data,
        image_size=model.config.video.image_size,
        tokenizer=model.tokenizer,
        batch=options.batch,
        device=device,
    )
    result = evaluate_retrieval(model, loader)
    print(retrieval_table(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except MissingVideosError as error:
        place = Path("missing_videos.txt")
        place.write_text("\n".join(error.missing) + "\n")
        sys.exit(f"error: {error}; all names are in {place}; --allow-missing measures the others")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
