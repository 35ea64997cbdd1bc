"""Text-video retrieval of a model on shards: python launch/evaluate.py MODEL --shards 'DIR/*.tar'"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.loader import EvaluationLoader
from miles_fast.distributed import configure_logging
from miles_fast.evaluation.retrieval import evaluate_retrieval, table
from miles_fast.export.run import load
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.checkpoint import model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="an exported folder, a run or a checkpoint")
    parser.add_argument("--shards", nargs="+", required=True, help="glob or brace patterns of tars")
    parser.add_argument("--frames", type=int, default=4, help="frames per clip")
    parser.add_argument("--caption-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="PREFIX", help="what URLs of shards may start with"
    )
    parser.add_argument("--json", type=Path, help="also write the metrics here")
    options = parser.parse_args()
    configure_logging()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = model_folder(options.model)
    source = SourceConfig(shards=options.shards, name="evaluation")
    data = DataConfig(
        train=[source],
        frames_per_clip=options.frames,
        caption_tokens=options.caption_tokens,
        allowed_prefixes=options.allow,
    )
    model = load(folder, str(device))
    loader = EvaluationLoader(
        source,
        data,
        image_size=model.config.video.image_size,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        batch=options.batch,
        device=device,
    )
    result = evaluate_retrieval(model, loader)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
