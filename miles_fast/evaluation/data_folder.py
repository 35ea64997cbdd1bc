"""A data set as it was downloaded: which files lie below its folder, and which ones it lacks."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from miles_fast.data.shards import VIDEO_EXTENSIONS
from miles_fast.data.video_files import VideoFile

SHOWN = 20


class MissingVideosError(ValueError):
    """Videos that a protocol names are not there; `missing` are all their names."""

    def __init__(self, message: str, missing: list[str]) -> None:
        super().__init__(message)
        self.missing = missing


class DataFolder:
    """The files below a folder, by name."""

    def __init__(self, root: str | Path, *, allow_missing: bool = False) -> None:
        """With `allow_missing` videos that are not there are left out; `missing` then names them.

        Raises ValueError when there is no such folder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"--data {root}: no such folder; name the one the data set was unpacked to")
        self.missing: list[str] = []
        self._allow_missing = allow_missing
        self._files: dict[str, list[str]] = defaultdict(list)
        for place, folders, names in os.walk(self.root, followlinks=True):
            folders.sort()
            for name in sorted(names):
                self._files[name].append(os.path.join(place, name))
                stem, _, extension = name.rpartition(".")
                if extension.lower() in VIDEO_EXTENSIONS:
                    self._files[f"{stem}."].append(os.path.join(place, name))

    def annotation(self, *names: str) -> Path:
        """The first of these files that is there. Raises ValueError naming all of them."""
        for name in names:
            found = self._files.get(name, [])
            if len(found) > 1:
                raise ValueError(f"{self.root}: {name} is there {len(found)} times: {', '.join(found[:3])}")
            if found:
                return Path(found[0])
        raise ValueError(
            f"{self.root}: annotation file missing: {' or '.join(names)}; launch/evaluate.py --about says "
            "where it comes from"
        )

    def annotations(self, suffix: str) -> list[Path]:
        """All files whose names end so, by name. Raises ValueError for a name that is there twice."""
        names = sorted(name for name in self._files if name.endswith(suffix))
        return [self.annotation(name) for name in names]

    def videos(self, names: Sequence[str]) -> list[VideoFile | None]:
        """The file of each name, with or without folder and extension; None for a missing one that may be.

        Raises ValueError for a name listed twice or found twice, MissingVideosError for what is not there.
        """
        doubled = _doubled(names)
        if doubled:
            raise ValueError(f"{self.root}: {len(doubled)} videos are listed twice: {_some(doubled)}")
        found = [self._find(name) for name in names]
        missing = [name for name, file in zip(names, found, strict=True) if file is None]
        if missing and (not self._allow_missing or len(missing) == len(names)):
            raise MissingVideosError(
                f"{self.root}: {len(missing)} of {len(names)} videos are missing: {_some(missing)}", missing
            )
        self.missing += missing
        return found

    def _find(self, name: str) -> VideoFile | None:
        path = PurePosixPath(name)
        extension = path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS
        places = self._files.get(path.name, []) if extension else []
        places = places or self._files.get(f"{path.stem if extension else path.name}.", [])
        if len(places) > 1:
            places = [place for place in places if place.endswith(f"{os.sep}{name}")] or places
        if len(places) > 1:
            raise ValueError(
                f"{self.root}: video {name} is there {len(places)} times: {', '.join(places[:3])}"
            )
        return VideoFile(key=name, path=places[0]) if places else None


def _doubled(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
