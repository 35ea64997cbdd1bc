"""Take a model away, or bring one in: python launch/export.py SOURCE --output OUTPUT [--from ...] [--to ...]

python launch/export.py runs/demo --output exported                            # a model folder of ours
python launch/export.py runs/demo --output MILES.pth --to official             # what the authors' code loads
python launch/export.py MILES.pth --output exported --from official --tokenizer distilbert-base-uncased
"""

from __future__ import annotations

import argparse
from typing import get_args

from miles_fast.distributed import configure_logging
from miles_fast.export.pretrained import Kind, read_pretrained, with_frames
from miles_fast.export.run import Target, write_pretrained
from miles_fast.training.signals import exit_with_status


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a run, a checkpoint (any ZeRO stage), a model folder, or a file")
    parser.add_argument("--output", required=True, help="a folder; a file for official, frozen and timm")
    parser.add_argument("--from", dest="kind", default="auto", choices=get_args(Kind), help="what SOURCE is")
    parser.add_argument("--to", dest="target", default="safetensors", choices=get_args(Target))
    parser.add_argument("--frames", type=int, help="interpolate temporal_embed to so many frames")
    parser.add_argument("--tokenizer", help="folder or name, for sources without one (official, frozen)")
    parser.add_argument("--base", help="--from timm: the model that the image tower is put into")
    parser.add_argument("--drop", nargs="+", default=[], metavar="PREFIX", help="unknown keys to leave out")
    options = parser.parse_args()
    configure_logging()
    found = read_pretrained(
        options.source, options.kind, tokenizer=options.tokenizer, base=options.base, drop=options.drop
    )
    if options.frames is not None:
        found = with_frames(found, options.frames)
    output, remark = write_pretrained(found, options.target, options.output)
    print(f"{output}: {remark}")
    for note in found.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    exit_with_status(main)
