"""What a benchmark protocol is: its files, its exact split, its measure, what others report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from miles_fast.data.video_files import VideoFile
from miles_fast.evaluation.data_folder import DataFolder

Part = Literal["train", "val", "test"]
TIES = (
    "ties count half: rank 1 + those above + those equal / 2 (the official code lets text-to-video win ties)"
)
TRANSFORM = (
    "centre square of the frame, bilinear with antialiasing to the model's size, ImageNet mean and std"
)
FRAMES = "the middle frame of equal segments of the whole file, one clip, no temporal ensembling"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Videos by name in the annotation's order, and what is said of them.

    Retrieval: `captions` of each video. Actions and templates: `labels` into `classes`. Multiple choice:
    `captions` are each video's options, `labels` the right one.
    """

    videos: list[str]
    captions: list[list[str]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """What a split must be: counts, and the first 16 digits of the SHA-256 of its names (see `digest`)."""

    videos: int
    captions: int | None = None
    names_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One benchmark. `reported` holds what papers report, by setting and method, in the words of `metric`.

    `verified` says which of the pins were checked against real files.
    """

    name: str
    task: Literal["retrieval", "actions", "multiple choice", "templates"]
    source: str
    metric: str
    read: Callable[[DataFolder, Part, int], Split]
    pinned: Mapping[str, Pinned]
    verified: str
    folds: tuple[int, ...] = (0,)
    frames: tuple[int, ...] = (4,)
    caption_tokens: int = 32
    reported: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def split(self, folder: DataFolder, part: Part = "test", fold: int = 0) -> tuple[Split, list[VideoFile]]:
        """A split and its files; videos that are missing, where they may be, are left out of both.

        Raises ValueError when the annotations are not the pinned ones, MissingVideosError for videos.
        """
        found = self.read(folder, part, fold)
        key = f"{part}{fold or ''}"
        self.check(found, key, folder)
        files = folder.videos(found.videos)
        there = [number for number, file in enumerate(files) if file is not None]
        return select(found, there), [file for file in files if file is not None]

    def check(self, found: Split, key: str, folder: DataFolder) -> None:
        """Raise ValueError where a split (`key`: its part and fold) is not the pinned one."""
        pinned = self.pinned.get(key)
        if pinned is None:
            return
        counts = {"videos": len(found.videos), "captions": sum(map(len, found.captions))}
        for what, count in counts.items():
            wanted = getattr(pinned, what)
            if wanted is not None and count != wanted:
                raise ValueError(
                    f"{folder.root}: {self.name} {key} has {count} {what}, the protocol's has {wanted}; the "
                    "annotation file is another or an incomplete one"
                )
        found_digest = digest(found.videos)
        if pinned.names_sha256 not in (None, found_digest):
            raise ValueError(
                f"{folder.root}: {self.name} {key} names other videos than the protocol's (SHA-256 "
                f"{found_digest}, not {pinned.names_sha256}): another split of the same size"
            )

    def about(self) -> str:
        """All of it, for people."""
        lines = [f"{self.name}: {self.task}", f"files: {self.source}"]
        for key, pinned in self.pinned.items():
            counts = f"{pinned.videos} videos" + (f", {pinned.captions} captions" if pinned.captions else "")
            names = f", names {pinned.names_sha256}" if pinned.names_sha256 else ""
            lines.append(f"split {key}: {counts}{names}")
        lines += [
            f"pins verified: {self.verified}",
            f"measure: {self.metric}; {TIES}",
            f"frames: {' and '.join(map(str, self.frames))}, {FRAMES}",
        ]
        lines += [f"transform: {TRANSFORM}", f"caption tokens: {self.caption_tokens}"]
        return "\n".join([*lines, self.reported_lines()])

    def reported_lines(self) -> str:
        """What papers report, a line a setting."""
        return "\n".join(
            f"reported, {setting}: " + "; ".join(f"{method} {figures}" for method, figures in methods.items())
            for setting, methods in self.reported.items()
        )


def digest(names: list[str]) -> str:
    """First 16 hex digits of the SHA-256 of the sorted names, without extensions, one a line."""
    stems = sorted(name.removesuffix(".mp4").removesuffix(".avi") for name in names)
    return hashlib.sha256("\n".join(stems).encode()).hexdigest()[:16]


def select(split: Split, numbers: list[int]) -> Split:
    """The split of these videos alone."""
    return Split(
        videos=[split.videos[n] for n in numbers],
        captions=[split.captions[n] for n in numbers] if split.captions else [],
        labels=[split.labels[n] for n in numbers] if split.labels else [],
        classes=split.classes,
    )


def of_captions(captions: dict[str, list[str]]) -> Split:
    """A retrieval split."""
    return Split(videos=list(captions), captions=list(captions.values()))


def of_labels(labels: dict[str, int], classes: list[str]) -> Split:
    """A split for recognition."""
    return Split(videos=list(labels), labels=list(labels.values()), classes=classes)
