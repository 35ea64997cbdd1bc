"""A run on one html page, without other files: python launch/report.py RUN [--output PAGE.html]

python launch/report.py runs/demo --clip holiday.mp4 "a dog jumps into water"   # the maps for your own clips
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from miles_fast.config import Config, SourceConfig, load_config
from miles_fast.data.loader import EvaluationLoader
from miles_fast.distributed import configure_logging
from miles_fast.export.encoder import VideoTextEncoder
from miles_fast.export.report_page import (
    Gallery,
    Looked,
    collect_gallery,
    read_actions,
    write_report,
)
from miles_fast.export.run import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--output", type=Path, help="default: RUN/report.html")
    parser.add_argument("--shards", nargs="+", help="the gallery; default: the run's first evaluation set")
    parser.add_argument("--gallery", type=int, default=1000, help="clips of it at most")
    parser.add_argument("--queries", type=int, default=8, help="queries that are shown")
    parser.add_argument("--maps", type=int, default=3, help="clips of the gallery to look into")
    parser.add_argument("--clip", nargs=2, action="append", default=[], metavar=("FILE", "TEXT"))
    parser.add_argument("--actions", type=Path, help="json with the confusion of zero-shot actions")
    options = parser.parse_args()
    configure_logging()
    if not (options.run / "config.json").is_file():
        raise ValueError(f"{options.run}: no config.json there; name the folder of a run")
    actions = read_actions(options.actions) if options.actions else None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load(options.run, str(device))
    config = load_config(options.run / "config.json")
    own = [
        Looked(video=model.read_videos([file], config.data.frames_per_clip), caption=text, name=file)
        for file, text in options.clip
    ]
    gallery, found = collect(config, model, options, device)
    page = options.output or options.run / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        options.run,
        page,
        model=model,
        gallery=gallery,
        looked=[*own, *found],
        actions=actions,
        queries=options.queries,
    )
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


def collect(
    config: Config, model: VideoTextEncoder, options: argparse.Namespace, device: torch.device
) -> tuple[Gallery | None, list[Looked]]:
    """The gallery that the options or the run name, if any does."""
    if options.shards:
        source = SourceConfig(shards=options.shards, name="gallery")
    elif config.data.evaluation:
        source = config.data.evaluation[0]
    else:
        return None, []
    loader = EvaluationLoader(
        source,
        replace(config.data, decode_workers=2),
        image_size=model.config.video.image_size,
        tokenizer=model.tokenizer,
        batch=16,
        device=device,
    )
    return collect_gallery(model, loader, options.gallery, options.maps)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
