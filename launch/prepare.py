"""Video tars, or a folder with captions, to frame shards:

python launch/prepare.py 'videos/*.tar' --output frames
python launch/prepare.py FOLDER --captions captions.csv --output frames
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.data.shards import expand_shards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", help="tars (glob or brace patterns), or one folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the frame shards")
    parser.add_argument("--captions", help="csv, tsv or json with the captions of a folder")
    parser.add_argument("--frames", type=int, default=8, help="frames kept of each clip")
    parser.add_argument("--short-side", type=int, default=256, help="pixels; never enlarged")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--samples-per-shard", type=int, default=512)
    parser.add_argument("--limit", type=int, help="only the first samples")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    options = parser.parse_args()
    folder = len(options.inputs) == 1 and Path(options.inputs[0]).is_dir()
    inputs = options.inputs if folder else expand_shards(options.inputs)
    plan = PreparationOptions(
        frames=options.frames,
        short_side=options.short_side,
        quality=options.quality,
        samples_per_shard=options.samples_per_shard,
        limit=options.limit,
        captions=options.captions,
    )
    print(json.dumps(asdict(prepare(inputs, options.output, plan, options.workers)), indent=2))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
