"""A model measured by a protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miles_fast.data.clips import BadSample
from miles_fast.data.video_files import VideoFile
from miles_fast.distributed import logger
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.embedding import Embedder
from miles_fast.evaluation.linear_probe import probe
from miles_fast.evaluation.prompts import PROMPTS, class_embeddings
from miles_fast.evaluation.protocol import Protocol, Split, select
from miles_fast.evaluation.ranks import best_ranks, dual_softmax


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Figures by what was measured ('text to video', 'one prompt, 4 frames'); what they do not cover.

    Recalls and accuracies are fractions. `missing` names videos that are not there, `unreadable` those that
    cannot be decoded: neither is scored, and a measurement with any of them is not the protocol's.
    """

    protocol: str
    figures: dict[str, dict[str, float]]
    chance: dict[str, float]
    videos: int
    missing: list[str] = field(default_factory=list)
    unreadable: list[BadSample] = field(default_factory=list)
    dual_softmax: bool = False


def measure(protocol: Protocol, folder: DataFolder, embedder: Embedder, *, dual: bool = False) -> Measurement:
    """Measure a model; all ranks must call it and get the same.

    `dual` scores retrieval with the dual softmax. Raises ValueError for annotations or videos that are not
    the protocol's, and when no video can be read.
    """
    if dual and protocol.task != "retrieval":
        raise ValueError(f"--dual-softmax is for retrieval; {protocol.name} is {protocol.task}")
    figures: dict[str, dict[str, float]] = {}
    unreadable: dict[str, BadSample] = {}
    chance: dict[str, float] = {}
    videos = 0
    for fold in protocol.folds:
        split, files = protocol.split(folder, "test", fold)
        for frames in protocol.frames:
            found, bad = embedder.videos(files, frames)
            unreadable |= {one.key: one for one in bad}
            readable = _readable(files, bad)
            part, rows = select(split, readable), found[readable]
            fold_figures, chance = _score(protocol, embedder, part, files, readable, rows, frames, dual)
            for name, values in fold_figures.items():
                for measure_name, value in values.items():
                    share = value / len(protocol.folds)
                    row = figures.setdefault(name, {})
                    row[measure_name] = row.get(measure_name, 0.0) + share
        videos += len(readable)
    return Measurement(
        protocol=protocol.name,
        figures=figures,
        chance=chance,
        videos=videos,
        missing=sorted(set(folder.missing)),
        unreadable=list(unreadable.values()),
        dual_softmax=dual,
    )


def _score(
    protocol: Protocol,
    embedder: Embedder,
    split: Split,
    files: list[VideoFile],
    readable: list[int],
    videos: Tensor,
    frames: int,
    dual: bool,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    length = protocol.caption_tokens
    if protocol.task == "retrieval":
        texts = embedder.texts([text for said in split.captions for text in said], length)
        return retrieval(texts, videos, split, dual)
    if protocol.task == "multiple choice":
        texts = embedder.texts([text for options in split.captions for text in options], length)
        return multiple_choice(texts, videos, split)
    if protocol.task == "templates":
        texts = class_embeddings(embedder, split.classes, "bare", length)
        backwards = embedder.videos(files, frames, reverse=True)[0][readable]
        forth, chance = templates(texts, videos, split)
        back, _ = templates(texts, backwards, split)
        return {**forth, **{f"{name}, frames reversed": row for name, row in back.items()}}, chance
    figures = {
        f"{prompt} prompt, {frames} frames": accuracy(
            class_embeddings(embedder, split.classes, prompt, length), videos, split.labels
        )
        for prompt in PROMPTS
    }
    return figures, top_by_chance(len(split.classes))


def _readable(files: list[VideoFile], bad: list[BadSample]) -> list[int]:
    """Numbers of the files that could be read. Raises ValueError when none could."""
    unreadable = {one.key for one in bad}
    readable = [number for number, file in enumerate(files) if file.key not in unreadable]
    if not readable:
        raise ValueError(f"none of {len(files)} videos can be read: {bad[0].message}")
    return readable


def measure_probe(protocol: Protocol, folder: DataFolder, embedder: Embedder, frames: int) -> Measurement:
    """A linear probe on the features of a protocol of actions, the mean of its folds; all ranks must call it.

    Raises ValueError for another kind of protocol, and as `measure` does.
    """
    if protocol.task not in ("actions", "templates"):
        raise ValueError(f"--protocol {protocol.name} is {protocol.task}: a probe needs classes")
    figures: dict[str, float] = {}
    unreadable: dict[str, BadSample] = {}
    videos = 0
    for fold in protocol.folds:
        features, splits = [], []
        for part in ("train", "test"):
            split, files = protocol.split(folder, part, fold)
            found, bad = embedder.videos(files, frames, projected=False)
            unreadable |= {one.key: one for one in bad}
            readable = _readable(files, bad)
            features.append(found[readable])
            splits.append(select(split, readable))
        train, test = splits
        classes = len(test.classes)
        found, penalty = probe(features[0], torch.tensor(train.labels), features[1], classes)
        logger.info("%s fold %d: penalty %g", protocol.name, fold, penalty)
        ranks = best_ranks(found, torch.tensor(test.labels), torch.arange(classes))
        for name, value in top(ranks).items():
            figures[name] = figures.get(name, 0.0) + value / len(protocol.folds)
        videos += len(test.videos)
    return Measurement(
        protocol=protocol.name,
        figures={f"linear probe, {frames} frames": figures},
        chance=top_by_chance(classes),
        videos=videos,
        missing=sorted(set(folder.missing)),
        unreadable=list(unreadable.values()),
    )


def retrieval(
    texts: Tensor, videos: Tensor, split: Split, dual: bool = False
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Both directions: each caption a query for its video, each video one for its best caption."""
    owners = torch.tensor([n for n, said in enumerate(split.captions) for _ in said])
    numbers = torch.arange(len(videos))
    similarity = texts @ videos.T
    forth, back = (
        (dual_softmax(s) for s in (similarity, similarity.T)) if dual else (similarity, similarity.T)
    )
    figures = {
        "text to video": recalls(best_ranks(forth, owners, numbers)),
        "video to text": recalls(best_ranks(back, numbers, owners)),
    }
    gallery = len(videos)
    guess = {f"R@{k}": min(k / gallery, 1.0) for k in (1, 5, 10)}
    return figures, {**guess, "MedR": (gallery + 1) / 2, "MeanR": (gallery + 1) / 2}


def templates(
    texts: Tensor, videos: Tensor, split: Split
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Each template a query for any of its clips, each clip one for its template."""
    labels = torch.tensor(split.labels)
    used = labels.unique()
    similarity = texts @ videos.T
    figures = {
        "template to video": recalls(best_ranks(similarity[used], used, labels)),
        "video to template": accuracy(texts, videos, split.labels),
    }
    return figures, top_by_chance(len(texts))


def multiple_choice(
    texts: Tensor, videos: Tensor, split: Split
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """How often a clip is nearest to its own option; an option that ties with another is not chosen."""
    right, start, guess = 0, 0, 0.0
    for video, options, answer in zip(videos, split.captions, split.labels, strict=True):
        scores = texts[start : start + len(options)] @ video
        start += len(options)
        guess += 1 / len(options)
        right += int((scores >= scores[answer]).sum() == 1)
    return {"multiple choice": {"top-1": right / len(videos)}}, {"top-1": guess / len(videos)}


def accuracy(texts: Tensor, videos: Tensor, labels: list[int]) -> dict[str, float]:
    """Top-1 and top-5 of videos among classes."""
    return top(best_ranks(videos @ texts.T, torch.tensor(labels), torch.arange(len(texts))))


def top(ranks: Tensor) -> dict[str, float]:
    """Top-1 and top-5 of ranks."""
    return {f"top-{k}": float((ranks <= k).double().mean()) for k in (1, 5)}


def top_by_chance(classes: int) -> dict[str, float]:
    """Top-1 and top-5 of guessing."""
    return {f"top-{k}": min(k / classes, 1.0) for k in (1, 5)}


def recalls(ranks: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10, median and mean rank."""
    figures = {f"R@{k}": float((ranks <= k).double().mean()) for k in (1, 5, 10)}
    return {**figures, "MedR": float(ranks.quantile(0.5)), "MeanR": float(ranks.mean())}


def table(measurement: Measurement) -> str:
    """The figures beside chance, for people, and what is not scored."""
    rows = {**measurement.figures, "chance": measurement.chance}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, rows)) + 2
    head = f"{measurement.protocol}, {measurement.videos} videos"
    lines = [head, " " * width + "".join(f"{name:>9}" for name in columns)]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{_shown(column, row):>9}" for column in columns))
    if measurement.dual_softmax:
        lines.append(
            "with dual softmax, which looks at all test queries: not comparable to figures without it"
        )
    if measurement.missing:
        lines.append(f"{len(measurement.missing)} videos are missing: this is not the whole protocol")
    if measurement.unreadable:
        lines.append(f"{len(measurement.unreadable)} videos cannot be read and are not scored:")
        lines += [f"  {one.key}: {one.message}" for one in measurement.unreadable]
    return "\n".join(lines)


def _shown(column: str, row: dict[str, Any]) -> str:
    if column not in row:
        return ""
    return f"{row[column]:.1f}" if column in ("MedR", "MeanR") else f"{100 * row[column]:.2f}"
