"""Unit embeddings of video files and captions, shared out over ranks and cached in parts.

A part is a fixed stretch of the list. Its file is named by the SHA-256 of all that its content depends on
(the weights, the files' sizes and times, the frames), so that a changed model or video can never find an old
one, and work that was killed goes on at its last part.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from miles_fast.data.augmentation import build_augmentation
from miles_fast.data.clips import BadSample, Clip
from miles_fast.data.video_files import VideoFile, decode_files
from miles_fast.distributed import gather_objects, rank, world_size
from miles_fast.evaluation.host_copies import on_host
from miles_fast.models.caption_tokens import CaptionEncoder, caption_length
from miles_fast.models.dual_encoder import DualEncoder, unit

PART = 256
FORMAT = "miles_fast embeddings of files/1"
Rows = tuple[np.ndarray, list[BadSample]]


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A model, where it computes, and how its input is read; `cache` is a folder, or None for no cache."""

    model: DualEncoder
    device: torch.device
    batch: int = 32
    num_workers: int = 4
    threads: int = 4
    cache: Path | None = None

    def videos(
        self, files: Sequence[VideoFile], num_frames: int, *, reverse: bool = False, projected: bool = True
    ) -> tuple[Tensor, list[BadSample]]:
        """(N, E) in the order of the files, NaN rows for unreadable ones, and the list of these.

        `reverse` shows each clip's frames in the opposite order. Not `projected` they are the encoder's [CLS]
        features (N, D), which linear probes are fitted to. All ranks must call it.
        """
        about = ["videos", num_frames, self.model.config.video.image_size, reverse, projected]

        def describe(file: VideoFile) -> list:
            status = os.stat(file.path)
            return [file.key, os.path.abspath(file.path), status.st_size, status.st_mtime_ns]

        def embed(parts: list[list[VideoFile]]) -> Iterator[Rows]:
            return self._embed_files(parts, num_frames, reverse, projected)

        return self._in_parts(list(files), about, describe, embed)

    def texts(self, captions: Sequence[str], length: int) -> Tensor:
        """(N, E) in the order of the captions, cut at `length` tokens or as many as the model takes.

        All ranks must call it.
        """
        length = caption_length(None, self.model.config.text.max_positions, usual=length)
        found, _ = self._in_parts(
            list(captions),
            ["texts", length],
            lambda text: text,
            lambda parts: ((self._embed_texts(part, length), []) for part in parts),
        )
        return found

    def _in_parts(
        self, items: list, about: list, describe: Callable, embed: Callable[[list[list]], Iterator[Rows]]
    ) -> tuple[Tensor, list[BadSample]]:
        """The rows of all items; `embed` gives those of the parts that are not in the cache, one by one."""
        known = fingerprint(self.model) if self.cache is not None else ""
        starts = range(0, len(items), PART)[rank() :: world_size()]
        parts = {start: items[start : start + PART] for start in starts}
        places: dict[int, Path] = {}
        if self.cache is not None:
            for start, part in parts.items():
                key = json.dumps([FORMAT, known, about, [describe(item) for item in part]])
                places[start] = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        own = {start: _load(place) for start, place in places.items() if place.is_file()}
        lacking = [start for start in starts if start not in own]
        embedded = embed([parts[start] for start in lacking]) if lacking else iter(())
        with tqdm(total=len(lacking), desc=about[0], disable=rank() != 0 or len(items) <= PART) as bar:
            for start, rows in zip(lacking, embedded, strict=True):
                own[start] = rows
                if start in places:
                    _store(places[start], rows)
                bar.update()
        everything = {start: rows for one in gather_objects(own) for start, rows in one.items()}
        ordered = [everything[start] for start in sorted(everything)]
        bad = [sample for _, unreadable in ordered for sample in unreadable]
        return torch.from_numpy(np.concatenate([rows for rows, _ in ordered])), bad

    def _embed_files(
        self, parts: list[list[VideoFile]], num_frames: int, reverse: bool, projected: bool
    ) -> Iterator[Rows]:
        """The rows of each part; the reading processes and the graph live over all of them."""
        width = self.model.config.embedding if projected else self.model.config.video.width
        files = [file for part in parts for file in part]
        with contextlib.closing(self._encode(files, num_frames, reverse, projected)) as encoded:
            rows = _one_by_one(on_host(encoded), width)
            for part in parts:
                found = list(itertools.islice(rows, len(part)))
                yield np.stack([row for row, _ in found]), [bad for _, bad in found if bad is not None]

    @torch.inference_mode()
    def _encode(
        self, files: Sequence[VideoFile], num_frames: int, reverse: bool, projected: bool
    ) -> Generator[tuple[list[BadSample | None], Tensor], None, None]:
        """Batches: for each file why it cannot be read, or None, and the rows (B, E or D) of the others."""
        augmentation = build_augmentation(
            "auto",
            takes="pixels",
            num_clips=self.batch,
            num_frames=num_frames,
            size=self.model.config.video.image_size,
            device=self.device,
            threads=self.threads,
        )
        coming: deque[list[BadSample | None]] = deque()  # batches in the graph

        def finish() -> tuple[list[BadSample | None], Tensor]:
            bad = coming.popleft()
            if None not in bad:
                return bad, torch.empty(0, device=self.device)
            video = augmentation.collect()
            video = video.flip(1) if reverse else video
            if projected:
                return bad, unit(self.model.embed_video(video))
            return bad, self.model.video_features(video).float()

        with contextlib.closing(
            decode_files(files, num_frames=num_frames, batch=self.batch, num_workers=self.num_workers)
        ) as batches:
            for clips in batches:
                readable = [clip for clip in clips if isinstance(clip, Clip)]
                if readable:
                    augmentation.submit([clip.frames for clip in readable], [clip.view for clip in readable])
                coming.append([clip if isinstance(clip, BadSample) else None for clip in clips])
                if len(coming) > 1:
                    yield finish()
            while coming:
                yield finish()

    @torch.inference_mode()
    def _embed_texts(self, captions: Sequence[str], length: int) -> np.ndarray:
        assert self.model.tokenizer is not None
        tokens_B2L = torch.from_numpy(CaptionEncoder(self.model.tokenizer, length)(captions)).to(self.device)
        return unit(self.model.embed_text(*tokens_B2L.unbind(1))).cpu().numpy()


def fingerprint(model: DualEncoder) -> str:
    """SHA-256 of the weights, by name and value, and of the tokenizer; take it before a change of dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    if model.tokenizer is not None:
        tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str())
        tokenizer.pop("truncation"), tokenizer.pop("padding")  # of the last call
        digest.update(json.dumps(tokenizer).encode())
    return digest.hexdigest()


def _one_by_one(
    batches: Iterable[tuple[list[BadSample | None], Tensor]], width: int
) -> Iterator[tuple[np.ndarray, BadSample | None]]:
    """For each file its row, or NaN and why there is none."""
    lacking = np.full(width, np.nan, np.float32)
    for bad, embeddings in batches:
        rows = iter(embeddings.numpy())
        for sample in bad:
            yield (lacking, sample) if sample is not None else (next(rows), None)


def default_cache() -> Path:
    """miles_fast/embeddings in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles_fast" / "embeddings"


def _load(place: Path) -> Rows:
    try:
        with np.load(place, allow_pickle=False) as file:
            return file["rows"], [BadSample(**one) for one in json.loads(str(file["bad"]))]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{place}: cannot be read ({error}); delete it") from error


def _store(place: Path, rows: Rows) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, rows=rows[0], bad=json.dumps([asdict(one) for one in rows[1]]))
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
