"""Random access to WebDataset tar shards by their indexes: sample number -> key, members, bytes, captions.

Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import glob
import json
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from miles_fast.data.shard_index import ShardError, build_index, load_listing

__all__ = ["SampleError", "ShardError", "ShardSet", "build_index", "expand_shards"]

VIDEO_EXTENSIONS = frozenset({"mp4", "webm", "mkv", "avi", "mov", "gif", "mpg"})
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_OPEN_SHARDS = 256
_FRAME = re.compile(r"\d+\.(?:jpg|jpeg|png|webp)\Z")


class SampleError(ValueError):
    """One sample cannot be used. `cause` is a short stable text, used as the key of counters."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.cause)


def expand_shards(patterns: str | Sequence[str]) -> list[Path]:
    """Files that the patterns name (braces, then globs), each once, sorted. ShardError if there are none."""
    from braceexpand import UnbalancedBracesError, braceexpand

    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        try:
            expanded = list(braceexpand(str(pattern)))
        except UnbalancedBracesError as error:
            raise ShardError(
                f"shard pattern {str(pattern)!r}: {error}; write it as 'data/{{00000..00041}}.tar'"
            ) from error
        matches = {
            Path(match) for one in expanded for match in ([one] if os.path.isfile(one) else glob.glob(one))
        }
        if not matches:
            raise ShardError(
                f"no shard matches {str(pattern)!r} (working directory {os.getcwd()}): correct the "
                "path, or write shards with `python launch/prepare.py INPUT --output DIR`: 'DIR/*.tar'"
            )
        found |= matches
    return sorted(found)


class _Descriptor:
    """An open file that closes when nobody reads from it any more: eviction never races with a read."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class ShardSet:
    """Samples of many shards under one number each, in the order of `paths`; threads may share it.

    Raises ShardError for a shard that cannot be used and SampleError for a sample that cannot.
    """

    def __init__(self, paths: Sequence[str | Path], *, missing_index: Literal["build", "error"] = "build"):
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise ShardError("a shard set needs at least one shard; name them as 'DIR/*.tar'")
        numbers: dict[str, int] = {}
        extensions, offsets, sizes = array("I"), array("q"), array("q")
        counts, key_ends, shard_sizes, keys = array("q"), array("q"), [], bytearray()
        for path in self.paths:
            listing = load_listing(path, missing_index)
            extensions.extend(numbers.setdefault(extension, len(numbers)) for extension in listing.extensions)
            offsets.extend(listing.offsets)
            sizes.extend(listing.sizes)
            counts.extend(listing.counts)
            for key in listing.keys:
                keys += key.encode("utf-8", "surrogateescape")
                key_ends.append(len(keys))
            shard_sizes.append(len(listing.keys))
        self._extension_names = list(numbers)
        self._kinds = [_kind(extension) for extension in self._extension_names]
        self._extensions = np.frombuffer(extensions, dtype=np.uint32)
        self._offsets = np.frombuffer(offsets, dtype=np.int64)
        self._sizes = np.frombuffer(sizes, dtype=np.int64)
        self._member_ends = np.cumsum(np.frombuffer(counts, dtype=np.int64))
        self._key_ends = np.frombuffer(key_ends, dtype=np.int64)
        self._keys = bytes(keys)
        self._shard_ends = np.cumsum(shard_sizes)
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        del state["_open"], state["_lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._key_ends)

    def _check(self, sample: int) -> None:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a shard set of {len(self)}")

    def _shard_number(self, sample: int) -> int:
        self._check(sample)
        return int(np.searchsorted(self._shard_ends, sample, side="right"))

    def _slice(self, sample: int) -> slice:
        self._check(sample)
        return slice(int(self._member_ends[sample - 1]) if sample else 0, int(self._member_ends[sample]))

    def key(self, sample: int) -> str:
        self._check(sample)
        start = int(self._key_ends[sample - 1]) if sample else 0
        return self._keys[start : int(self._key_ends[sample])].decode("utf-8", "surrogateescape")

    def shard(self, sample: int) -> Path:
        return self.paths[self._shard_number(sample)]

    def extensions(self, sample: int) -> tuple[str, ...]:
        """What follows the key's dot, for each member in file order: ("00.jpg", ..., "json", "txt")."""
        return tuple(self._extension_names[number] for number in self._extensions[self._slice(sample)])

    def describe(self, sample: int) -> str:
        return f"{self.shard(sample)}: sample {self.key(sample)!r}"

    def layout(self, sample: int) -> Literal["frames", "video", "image"]:
        """Which of the layouts the sample has; a clip in frames is preferred to the video it came from."""
        kinds = {self._kinds[number] for number in self._extensions[self._slice(sample)]}
        for kind in ("frames", "video", "image"):
            if kind in kinds:
                return kind
        raise SampleError(
            f"{self.describe(sample)} has neither frames nor a video nor an image, only "
            f"{self.extensions(sample)} (what follows the first dot of a name is the extension)",
            "no media",
        )

    def frame_extensions(self, sample: int) -> tuple[str, ...]:
        """Extensions of the frames in the order of their numbers; of an image sample the one image."""
        layout = self.layout(sample)
        named = [e for e in self.extensions(sample) if _kind(e) == layout]
        if layout == "video":
            raise SampleError(f"{self.describe(sample)} is a video, not frames", "not frames")
        return (
            tuple(sorted(named, key=lambda e: (int(e.split(".")[0]), e)))
            if layout == "frames"
            else (min(named),)
        )

    def video_extension(self, sample: int) -> str:
        named = [e for e in self.extensions(sample) if _kind(e) == "video"]
        if not named:
            raise SampleError(
                f"{self.describe(sample)} has no video, only {self.extensions(sample)}", "no media"
            )
        return min(named)

    def read(self, sample: int, extension: str) -> bytes:
        """Bytes of one member."""
        members = self._slice(sample)
        number = self._extension_number(extension)
        found = np.flatnonzero(self._extensions[members] == number) if number is not None else ()
        if not len(found):
            raise SampleError(
                f"{self.describe(sample)} has no member {extension!r}, only {self.extensions(sample)}",
                "missing member",
            )
        member = members.start + int(found[0])
        shard = self._shard_number(sample)
        wanted, start = int(self._sizes[member]), int(self._offsets[member])
        descriptor = self._descriptor(shard)
        data = os.pread(descriptor.number, wanted, start)
        while len(data) < wanted:
            more = os.pread(descriptor.number, wanted - len(data), start + len(data))
            if not more:
                raise ShardError(
                    f"{self.describe(sample)}: member {extension!r} has {wanted} bytes by the index, "
                    f"{len(data)} could be read: the shard changed while in use; restore it, or delete its "
                    ".idx (it is rebuilt)"
                )
            data += more
        return data

    def _extension_number(self, extension: str) -> int | None:
        return self._extension_numbers.get(extension)

    @cached_property
    def _extension_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._extension_names)}

    def _descriptor(self, shard: int) -> _Descriptor:
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None:
                try:
                    descriptor = self._open[shard] = _Descriptor(self.paths[shard])
                except OSError as error:
                    raise ShardError(
                        f"{self.paths[shard]}: cannot be opened ({error.strerror}); restore it"
                    ) from error
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return descriptor

    def captions(self, sample: int, *, every: bool = False) -> list[str]:
        """Captions of one sample: the whole of KEY.txt, else `caption` or `captions` of KEY.json.

        With `every`, the list `captions` of KEY.json comes first: preparation keeps all captions of a clip
        there and the first one in KEY.txt. SampleError: no caption, empty caption, caption not readable.
        """
        extensions = self.extensions(sample)
        if "json" in extensions and (every or "txt" not in extensions):
            found = _json_captions(
                self.read(sample, "json"), self.describe(sample), every and "txt" in extensions
            )
            if found is not None:
                return found
        if "txt" not in extensions:
            raise SampleError(
                f"{self.describe(sample)} has no caption: KEY.txt or `caption` in KEY.json", "no caption"
            )
        try:
            text = self.read(sample, "txt").decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SampleError(
                f"{self.describe(sample)}: KEY.txt is not UTF-8 ({error})", "caption not readable"
            ) from error
        if not text:
            raise SampleError(f"{self.describe(sample)}: KEY.txt is empty", "empty caption")
        return [text]


def _kind(extension: str) -> str | None:
    extension = extension.lower()
    if _FRAME.match(extension):
        return "frames"
    return "video" if extension in VIDEO_EXTENSIONS else "image" if extension in IMAGE_EXTENSIONS else None


def _json_captions(data: bytes, sample: str, optional: bool) -> list[str] | None:
    """Captions in the bytes of KEY.json; where optional, only a list counts and nothing is an error."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        if optional:
            return None
        raise SampleError(f"{sample}: KEY.json is not JSON ({error})", "caption not readable") from error
    record = record if isinstance(record, dict) else {}
    listed = record.get("captions")
    if not isinstance(listed, list) or not listed:
        listed = [] if optional else [record.get("caption")]
    captions = [caption.strip() for caption in listed if isinstance(caption, str)]
    found = [caption for caption in captions if caption]
    if found or optional:
        return found or None
    if captions:
        raise SampleError(f"{sample}: every caption of KEY.json is empty", "empty caption")
    return None
