"""Turn video tars, or a folder and its caption file, into the shards that training reads.

python launch/prepare.py 'videos/{00000..00041}.tar' --output data/webvid
python launch/prepare.py clips/ --captions clips/captions.csv --output data/clips
python launch/prepare.py 'data/clips/*.tar' --look --output page.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from miles_fast.data.clip_list import ClipListError
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.sample_page import write_sample_page
from miles_fast.data.shards import ShardError, expand_shards
from miles_fast.options import refuse_unused


def main() -> int:
    defaults = PreparationOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="tars (braces and globs; https and s3 too), or one folder"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--look", action="store_true", help="only write a page (--output PAGE.html) of 40 samples of shards"
    )
    parser.add_argument("--caption-column", metavar="NAME", help="of --captions, where not `caption`")
    parser.add_argument(
        "--captions", metavar="FILE", help="csv, tsv, json or jsonl: the captions of a folder"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--frames", type=int, default=defaults.frames, help="frames kept of each clip")
    chosen.add_argument("--fps", type=float, help="frames of each second, instead of --frames")
    parser.add_argument(
        "--max-frames", type=int, default=defaults.max_frames, help="with --fps; the whole clip is covered"
    )
    parser.add_argument("--short-side", type=int, default=defaults.short_side, help="pixels; never enlarged")
    layout = parser.add_mutually_exclusive_group()
    for name, does in (
        ("remux", "write videos for NVDEC: H.264 and HEVC as they are, without cropping"),
        ("transcode", "write videos for NVDEC: H.264 of --short-side, --fps and --gop"),
    ):
        layout.add_argument(
            f"--{name}", action="store_const", dest="layout", const=name, default="frames", help=does
        )
    parser.add_argument("--gop", type=int, default=defaults.gop, help="--transcode: frames to a key frame")
    parser.add_argument("--quality", type=int, default=defaults.quality, help="JPEG quality, 1 to 100")
    parser.add_argument("--samples-per-shard", type=int, default=defaults.samples_per_shard)
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    parser.add_argument("--limit", type=int, help="stop after so many clips")
    parser.add_argument("--allow-hdr", action="store_true", help="keep HDR videos, mapped to bt709")
    options = parser.parse_args()
    given = dict(vars(options))
    where = {name: given.pop(name) for name in ("inputs", "output", "captions", "caption_column")}
    if options.look:
        others = [name for name in vars(options) if name not in ("inputs", "output", "look", "layout")]
        refuse_unused(parser, options, others, "with --look")
    if options.fps is None:
        refuse_unused(parser, options, ("max_frames",), "without --fps")
    if options.layout != "transcode":
        refuse_unused(parser, options, ("gop",), "without --transcode")
    try:
        if given.pop("look"):
            return look(where["inputs"], Path(where["output"]))
        summary = prepare(options=PreparationOptions(**given), **where)
    except (PreparationError, ClipListError, ShardError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    print(
        f"{summary.kept} clips in {len(summary.shards)} shards, {summary.num_bytes / 1e6:.1f} MB, "
        f"{summary.seconds:.0f} s, {summary.clips_per_second:.1f} clips/s; dropped "
        f"{sum(summary.dropped.values())}{f' {summary.dropped}' if summary.dropped else ''}; look at "
        f"{Path(where['output']) / 'sample.html'} before you train"
    )
    return 0


def look(shards: list[str], page: Path) -> int:
    """Write a page of samples of existing shards. Raises PreparationError, ShardError, OSError."""
    if page.is_dir():
        raise PreparationError(f"--output {page} is a folder: name a page in it, {page / 'sample.html'}")
    if page.suffix not in (".html", ".htm"):
        raise PreparationError(f"--output {page}: --look writes a page, name it .html")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_sample_page(expand_shards(shards), page, seed="look", about=" ".join(shards))
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
