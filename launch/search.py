"""Clips that a text describes: python launch/search.py "a dog jumps into water" --index DIR"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from miles_fast.distributed import configure_logging
from miles_fast.evaluation.embedding import fingerprint
from miles_fast.export.embedding_set import read_set
from miles_fast.export.run import load
from miles_fast.export.search import nearest
from miles_fast.options import at_least
from miles_fast.training.signals import exit_with_status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("query", nargs="+", help="a text; several are answered one after the other")
    parser.add_argument("--index", required=True, type=Path, help="a folder that launch/embed.py wrote")
    parser.add_argument("--model", help="where the model is now, when it was moved")
    parser.add_argument("--tokenizer", help="folder or name, for a .pth, which holds none")
    parser.add_argument("--top", type=at_least(1), default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object for each query")
    options = parser.parse_args()
    configure_logging()
    index = read_set(options.index)
    place = options.model or index.description.model
    model = load(place, tokenizer=options.tokenizer)
    if fingerprint(model) != index.description.fingerprint:
        raise ValueError(
            f"{place}: its weights are not those that {options.index} was made with; name that model with "
            "--model, or embed the set again"
        )
    queries = model.encode_text(options.query, length=index.description.caption_tokens).numpy()
    cosines, places = nearest(queries, index.videos, options.top)
    for query, row, found in zip(options.query, cosines, places, strict=True):
        print_answer(query, row, found, index, as_json=options.json)


def print_answer(query: str, cosines: np.ndarray, places: np.ndarray, index, *, as_json: bool) -> None:
    """The nearest clips of one query, for people or as JSON."""
    if as_json:
        clips = [
            {
                "key": index.keys[place],
                "shard": index.shards[place],
                "caption": index.captions[place],
                "cosine": round(float(cosine), 6),
            }
            for cosine, place in zip(cosines, places, strict=True)
        ]
        print(json.dumps({"query": query, "clips": clips}))
        return
    print(query)
    for rank, (cosine, place) in enumerate(zip(cosines, places, strict=True), start=1):
        print(f"{rank:>4}  {cosine:.3f}  {index.keys[place]}  {index.captions[place]}")
        print(f"{'':>13}{index.shards[place]}")


if __name__ == "__main__":
    exit_with_status(main)
