"""The demo corpus on disk: the clips of demo_scenes as H.264 mp4 with captions, in video2dataset's layout.

Every sample is a pure function of (recipe, split, index): on one build of PyAV and x264 the same recipe
writes the same bytes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from miles_fast.data.demo_scenes import (
    SPLITS,
    TEMPLATES,
    Recipe,
    clip_stream,
    draw_boxes,
    draw_meaning,
    render_clip,
)


@dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    """Shards of both splits, in order."""

    train_tars: list[Path]
    heldout_tars: list[Path]


def _encode(clip: np.ndarray, recipe: Recipe) -> bytes:
    """The frames (T, H, W, 3) as an H.264 mp4, with the same bytes every time.

    One thread, because x264's bytes depend on their number. No macroblock tree: with it and B-frames, x264's
    assembly (core 165) gave other bytes for about one clip in five as the contents of fresh memory changed.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": str(recipe.crf), "x264-params": "mbtree=0"}
        track = container.add_stream("libx264", rate=recipe.fps, options=options)
        track.width = track.height = recipe.pixels
        track.pix_fmt = "yuv420p"
        track.codec_context.gop_size = recipe.gop
        track.codec_context.thread_count = 1
        for image in clip:
            container.mux(track.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(track.encode())
    return buffer.getvalue()


def _sample(recipe: Recipe, split: str, index: int) -> dict[str, str | bytes]:
    stream = clip_stream(recipe.seed, split, index)
    meaning = draw_meaning(recipe.seed, split, index)
    template = int(stream.integers(len(TEMPLATES)))
    caption = meaning.caption(template)
    boxes = draw_boxes(meaning, stream, recipe)
    objects = [
        {**asdict(mover), "boxes": box.round(2).tolist()}
        for mover, box in zip((meaning.first, meaning.second), boxes, strict=True)
    ]
    key = f"{index:09d}"
    facts = {"key": key, "caption": caption, "template": template, "objects": objects}
    facts |= {"duration": recipe.frames / recipe.fps, "fps": recipe.fps}
    facts |= {"width": recipe.pixels, "height": recipe.pixels}
    mp4 = _encode(render_clip(meaning, stream, recipe, boxes), recipe)
    return {"__key__": key, "mp4": mp4, "txt": caption.encode(), "json": json.dumps(facts).encode()}


def _write_shard(tar: Path, recipe: Recipe, split: str, indices: range) -> int:
    """Write one shard and return how many clips it has; the file gets its name only when it is whole."""
    from webdataset import TarWriter

    partial = tar.with_name(tar.name + ".partial")
    with open(partial, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for index in indices:
            writer.write(_sample(recipe, split, index))
    os.replace(partial, tar)
    return len(indices)


def _shards(folder: Path, recipe: Recipe, split: str) -> Iterator[tuple[Path, Recipe, str, range]]:
    num_clips = recipe.num_train if split == "train" else recipe.num_heldout
    for number, start in enumerate(range(0, num_clips, recipe.shard_clips)):
        indices = range(start, min(start + recipe.shard_clips, num_clips))
        yield folder / split / f"{number:05d}.tar", recipe, split, indices


def build_demo_corpus(root: Path, recipe: Recipe | None = None, workers: int | None = None) -> DemoCorpus:
    """Write `root/video/{train,heldout}/NNNNN.tar`, or keep what an equal recipe has already written there.

    Samples are KEY.mp4, KEY.txt and KEY.json (caption, words and per-frame boxes in pixels of both objects).
    The recipe becomes `root/video/recipe.json` when all shards stand; until then it is `recipe.json.partial`,
    and a build cut short goes on with the missing shards. Another recipe's shards are removed. `workers` are
    spawned processes (one per usable core when None), so a calling program needs its `__main__` guard; one
    process at a time may build in `root`. Raises ValueError when `root/video` holds files of another origin
    or `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1, or None for one per usable core")
    recipe = recipe or Recipe()
    folder = Path(root) / "video"
    final, partial = folder / "recipe.json", folder / "recipe.json.partial"
    wanted = json.dumps({"fingerprint": recipe.fingerprint(), **asdict(recipe)}, indent=1) + "\n"
    jobs = {split: list(_shards(folder, recipe, split)) for split in SPLITS}
    corpus = DemoCorpus(
        train_tars=[job[0] for job in jobs["train"]], heldout_tars=[job[0] for job in jobs["heldout"]]
    )
    written = next((path.read_text() for path in (final, partial) if path.exists()), None)
    if written is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and has no recipe.json: choose another root, or empty it")
    if written != wanted:
        for split in SPLITS:
            if (folder / split).exists():
                shutil.rmtree(folder / split)
        final.unlink(missing_ok=True)
    missing = [job for split in SPLITS for job in jobs[split] if not job[0].exists()]
    if final.exists() and not missing:
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    partial.write_text(wanted)
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    workers = min(workers or len(os.sched_getaffinity(0)), len(missing))
    with tqdm(total=sum(len(job[3]) for job in missing), desc="demo corpus", unit="clip") as bar:
        for num_clips in _written_shards(missing, workers):
            bar.update(num_clips)
    os.replace(partial, final)
    return corpus


def _written_shards(jobs: list[tuple[Path, Recipe, str, range]], workers: int) -> Iterator[int]:
    if workers <= 1:
        yield from (_write_shard(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_shard, *zip(*jobs, strict=True))
