"""Random access to WebDataset tar shards by their indexes: sample number -> key, members, bytes, captions.

Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from miles_fast.data.locations import expand_shards, is_remote
from miles_fast.data.remote_file import RemoteFile
from miles_fast.data.shard_cache import ShardCache
from miles_fast.data.shard_index import Listing, ShardError, build_index, load_listing

__all__ = ["Sample", "SampleError", "ShardError", "ShardSet", "build_index", "expand_shards"]

VIDEO_EXTENSIONS = frozenset({"mp4", "webm", "mkv", "avi", "mov", "gif", "mpg"})
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_OPEN_SHARDS = 256
LOOK_UPS = 32  # remote shards asked for at the same time
_FRAME = re.compile(r"\d+\.(?:jpg|jpeg|png|webp)\Z")


class SampleError(ValueError):
    """One sample cannot be used. `cause` is a short stable text, used as the key of counters."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.cause)


class _Descriptor:
    """An open file that closes when nobody reads from it any more: eviction never races with a read."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


class ShardSet:
    """Samples of many shards under one number each, in the order of `paths`; threads may share it.

    A remote shard is a URL when it is named and a RemoteFile among `paths`; the cache holds its bytes.

    Raises ShardError for a shard that cannot be used and SampleError for a sample that cannot.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        missing_index: Literal["build", "error"] = "build",
        cache: ShardCache | None = None,
    ):
        self.paths: list[Path | RemoteFile] = []
        self.cache = cache
        if not paths:
            raise ShardError("a shard set needs at least one shard; name them as 'DIR/*.tar'")
        numbers: dict[str, int] = {}
        extensions, offsets, sizes = array("I"), array("q"), array("q")
        counts, key_ends, shard_sizes, keys = array("q"), array("q"), [], bytearray()
        for path, listing in _listings(paths, missing_index, cache):
            self.paths.append(path)
            extensions.extend(numbers.setdefault(extension, len(numbers)) for extension in listing.extensions)
            offsets.extend(listing.offsets)
            sizes.extend(listing.sizes)
            counts.extend(listing.counts)
            for key in listing.keys:
                keys += key.encode("utf-8", "surrogateescape")
                key_ends.append(len(keys))
            shard_sizes.append(len(listing.keys))
        self._extension_names = list(numbers)
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

    def __getitem__(self, number: int) -> Sample:
        """One sample, by its number from 0. IndexError where there is none."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a shard set of {len(self)}")
        start = int(self._key_ends[number - 1]) if number else 0
        key = self._keys[start : int(self._key_ends[number])].decode("utf-8", "surrogateescape")
        first = int(self._member_ends[number - 1]) if number else 0
        members = slice(first, int(self._member_ends[number]))
        places = zip(self._offsets[members].tolist(), self._sizes[members].tolist(), strict=True)
        names = [self._extension_names[extension] for extension in self._extensions[members].tolist()]
        shard = int(np.searchsorted(self._shard_ends, number, side="right"))
        found: dict[str, tuple[int, int]] = {}
        for name, place in zip(names, places, strict=True):
            found.setdefault(name, place)
        return Sample(self, shard, key, found)

    @property
    def shard_ends(self) -> np.ndarray:
        """Number of samples up to the end of each shard."""
        return self._shard_ends

    def descriptor(self, shard: int) -> _Descriptor:
        """Open file of a shard, kept open until many others were read."""
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None:
                descriptor = self._open[shard] = _Descriptor(self._open_file(self.paths[shard]))
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return descriptor

    def _open_file(self, place: Path | RemoteFile) -> int:
        if isinstance(place, RemoteFile):
            assert self.cache is not None
            self._open.clear()  # an open shard takes room in the cache, which this one may need
            return self.cache.open(place)
        try:
            return os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{place}: cannot be opened ({error.strerror}); restore it") from error

    def release(self) -> None:
        """Let the cache have the room of remote shards that were read."""
        if self.cache is not None:
            with self._lock:
                self._open.clear()


def _listings(
    paths: Sequence[str | Path], missing_index: Literal["build", "error"], cache: ShardCache | None
) -> Iterator[tuple[Path | RemoteFile, Listing]]:
    """Each shard with its listing; remote ones are asked for some at a time."""

    def load(path: str | Path) -> tuple[Path | RemoteFile, Listing]:
        if is_remote(path):
            if cache is None:
                raise ShardError(f"{path}: only training and evaluation read remote shards; download it")
            return cache.look_up(str(path))
        return Path(path), load_listing(Path(path), missing_index)

    if cache is None:
        yield from map(load, paths)
        return
    with ThreadPoolExecutor(LOOK_UPS) as pool:
        for start in range(0, len(paths), 2 * LOOK_UPS):  # listings are large: not all of them at once
            yield from pool.map(load, paths[start : start + 2 * LOOK_UPS])


class Sample:
    """One sample of a shard set: its key, its shard, and the members that can be read of it."""

    def __init__(self, shards: ShardSet, shard_number: int, key: str, places: dict[str, tuple[int, int]]):
        self._shards, self._shard_number, self._places = shards, shard_number, places
        self.key = key

    @property
    def shard(self) -> Path | RemoteFile:
        """The tar that holds it."""
        return self._shards.paths[self._shard_number]

    @property
    def extensions(self) -> tuple[str, ...]:
        """What follows the key's dot, for each member in file order: ("00.jpg", ..., "json", "txt")."""
        return tuple(self._places)

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r}"

    def layout(self) -> Literal["frames", "video", "image"]:
        """Which of the layouts the sample has; a clip in frames is preferred to the video it came from."""
        kinds = {_kind(extension) for extension in self._places}
        for kind in ("frames", "video", "image"):
            if kind in kinds:
                return kind
        raise SampleError(
            f"{self} has neither frames nor a video nor an image, only {self.extensions} (what follows the "
            "first dot of a name is the extension)",
            "no media",
        )

    def frame_extensions(self) -> tuple[str, ...]:
        """Extensions of the frames in the order of their numbers; of an image sample the one image."""
        layout = self.layout()
        named = [e for e in self._places if _kind(e) == layout]
        if layout == "video":
            raise SampleError(f"{self} is a video, not frames", "not frames")
        if layout == "image":
            return (min(named),)
        return tuple(sorted(named, key=lambda e: (int(e.split(".")[0]), e)))

    def video_extension(self) -> str:
        named = [e for e in self._places if _kind(e) == "video"]
        if not named:
            raise SampleError(f"{self} has no video, only {self.extensions}", "no media")
        return min(named)

    def read(self, extension: str) -> bytes:
        """Bytes of one member."""
        place = self._places.get(extension)
        if place is None:
            raise SampleError(f"{self} has no member {extension!r}, only {self.extensions}", "missing member")
        start, wanted = place
        descriptor = self._shards.descriptor(self._shard_number)
        data = os.pread(descriptor.number, wanted, start)
        while len(data) < wanted:
            more = os.pread(descriptor.number, wanted - len(data), start + len(data))
            if not more:
                raise ShardError(
                    f"{self}: member {extension!r} has {wanted} bytes by the index, {len(data)} could be "
                    "read: the shard changed while in use; restore it, or delete its .idx (it is rebuilt)"
                )
            data += more
        return data

    def record(self) -> dict:
        """KEY.json, {} where there is none or it holds no object. SampleError when it is not JSON."""
        if "json" not in self._places:
            return {}
        data = self.read("json")
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{self}: KEY.json is not JSON ({error})", "json not readable") from error
        return record if isinstance(record, dict) else {}

    def crop(self, record: dict) -> tuple[int, int] | None:
        """(width, height) that a remuxed video shows of its frames, from the upper left corner; None: all.

        `record` is KEY.json. SampleError: wrong crop.
        """
        crop = record.get("crop")
        if crop is None:
            return None
        if not (isinstance(crop, list) and len(crop) == 2 and all(isinstance(side, int) for side in crop)):
            raise SampleError(f"{self}: `crop` in KEY.json is {crop}, not [width, height]", "wrong crop")
        return crop[0], crop[1]

    def captions(self, *, every: bool = False, record: dict | None = None) -> list[str]:
        """Captions: the whole of KEY.txt, else `caption` or `captions` of KEY.json.

        With `every`, the list `captions` of KEY.json comes first: preparation keeps all captions of a clip
        there and the first one in KEY.txt. `record` is KEY.json where the caller has read it. SampleError: no
        caption, empty caption, caption not readable, json not readable.
        """
        spoken = "txt" in self._places
        if every or not spoken:
            record = self.record() if record is None else record
            found = _listed_captions(record)
            if found or not spoken:
                return found or [self._only_caption(record)]
        try:
            text = self.read("txt").decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SampleError(f"{self}: KEY.txt is not UTF-8 ({error})", "caption not readable") from error
        if not text:
            raise SampleError(f"{self}: KEY.txt is empty", "empty caption")
        return [text]

    def _only_caption(self, record: dict) -> str:
        """`caption` of KEY.json, for a sample without KEY.txt."""
        if isinstance(record.get("captions"), list) and record["captions"]:
            raise SampleError(f"{self}: every caption of KEY.json is empty", "empty caption")
        caption = record.get("caption")
        if not isinstance(caption, str):
            raise SampleError(f"{self} has no caption: KEY.txt or `caption` in KEY.json", "no caption")
        if not caption.strip():
            raise SampleError(f"{self}: the caption in KEY.json is empty", "empty caption")
        return caption.strip()


@functools.cache
def _kind(extension: str) -> str | None:
    extension = extension.lower()
    if _FRAME.match(extension):
        return "frames"
    return "video" if extension in VIDEO_EXTENSIONS else "image" if extension in IMAGE_EXTENSIONS else None


def _listed_captions(record: dict) -> list[str]:
    """The texts of `captions` in KEY.json that say something."""
    listed = record.get("captions")
    captions = [c.strip() for c in listed if isinstance(c, str)] if isinstance(listed, list) else []
    return [caption for caption in captions if caption]
