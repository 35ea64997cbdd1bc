"""A run on one html page, without other files: python launch/report.py RUN [--output PAGE.html]

An exported or Hugging Face folder, a checkpoint or a .pth gives the page without the curves.

python launch/report.py exported --output page.html --shards 'data/demo/frames/heldout/*.tar'
python launch/report.py runs/demo --clip holiday.mp4 "a dog jumps into water"   # the maps for your own clips
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from miles_fast.config import Config, DataConfig, SourceConfig
from miles_fast.config_tree import load_config, to_dict
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
from miles_fast.models.caption_tokens import caption_length
from miles_fast.options import at_least
from miles_fast.training.progress import read_log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="the folder of a run, or any model")
    parser.add_argument("--tokenizer", help="folder or name, for a .pth, which holds none")
    parser.add_argument("--output", type=Path, help="default: RUN/report.html")
    parser.add_argument("--shards", nargs="+", help="the gallery; default: the run's first evaluation set")
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="PREFIX", help="what URLs of shards may start with"
    )
    parser.add_argument("--gallery", type=at_least(1), default=1000, help="clips of it at most")
    parser.add_argument("--queries", type=at_least(0), default=8, help="queries that are shown")
    parser.add_argument("--maps", type=at_least(0), default=3, help="clips of the gallery to look into")
    parser.add_argument("--clip", nargs=2, action="append", default=[], metavar=("FILE", "TEXT"))
    parser.add_argument("--actions", type=Path, help="json with the confusion of zero-shot actions")
    options = parser.parse_args()
    configure_logging()
    run = (options.source / "log.jsonl").is_file()
    page = options.output or (options.source / "report.html" if run else None)
    if page is None:
        raise ValueError(
            f"{options.source}: no log.jsonl there: name a run, or say where a model's page goes (--output)"
        )
    actions = read_actions(options.actions) if options.actions else None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load(options.source, str(device), tokenizer=options.tokenizer)
    config = load_config(options.source / "config.json") if run else None
    frames = config.data.frames_per_clip if config else model.config.video.num_frames
    own = [
        Looked(video=model.read_videos([file], frames), caption=text, name=Path(file).name)
        for file, text in options.clip
    ]
    gallery, found = collect(config, model, options, device)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        page,
        name=options.source.name,
        log=read_log(options.source) if run else [],
        config=to_dict(config or model.config),
        model=model,
        gallery=gallery,
        looked=[*own, *found],
        actions=actions,
        queries=options.queries,
    )
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


def collect(
    config: Config | None, model: VideoTextEncoder, options: argparse.Namespace, device: torch.device
) -> tuple[Gallery | None, list[Looked]]:
    """The gallery that the options or the run name, if any does."""
    if options.shards:
        source = SourceConfig(shards=options.shards, name="gallery")
    elif config and config.data.evaluation:
        source = config.data.evaluation[0]
    else:
        return None, []
    if config:
        data = config.data
    else:
        frames, tokens = model.config.video.num_frames, caption_length(None, model.config.text.max_positions)
        data = DataConfig(train=[source], frames_per_clip=frames, caption_tokens=tokens)
    allowed = [*data.allowed_prefixes, *options.allow]
    loader = EvaluationLoader(
        source,
        replace(data, decode_workers=2, allowed_prefixes=allowed),
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
