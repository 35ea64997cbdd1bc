"""Where preparation finds clips at hand: tars in any layout, or a folder with a caption file; picklable."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_fast.data.clip_list import ListedClip, list_clips
from miles_fast.data.preparation_options import PreparationError
from miles_fast.data.shards import IMAGE_EXTENSIONS, SampleError, ShardSet

# A ustar name holds 100 bytes; what is appended is a frame number and an extension.
_MAX_KEY_BYTES = 80


@dataclass(frozen=True, kw_only=True)
class SourceClip:
    """One clip to prepare: the bytes or path of its video, or its pictures, and what is said of it.

    `crop` (width, height) is what a remuxed video shows of its frames.
    """

    video: bytes | Path | None
    pictures: tuple[bytes | Path, ...]
    captions: tuple[str, ...]
    source: dict[str, str]
    name: str
    crop: tuple[int, int] | None = None

    def texts(self, record: dict) -> dict[str, bytes]:
        """Members txt (the first caption) and json: the record, and all captions where there are several."""
        if len(self.captions) > 1:
            record = record | {"captions": list(self.captions)}
        return {
            "txt": self.captions[0].encode("utf-8", "replace"),
            "json": json.dumps(record, sort_keys=True).encode(),
        }


def safe_key(name: str) -> str:
    """A WebDataset key for a name: no dots, no white space, short enough for a tar header."""
    parts = name.encode("utf-8", "replace").decode("utf-8").strip("/").split("/")
    key = "/".join("".join("_" if c.isspace() or c == "." else c for c in part) for part in parts)
    if len(key.encode()) <= _MAX_KEY_BYTES:
        return key
    short = key.rpartition("/")[2].encode()[: _MAX_KEY_BYTES - 13].decode("utf-8", "ignore")
    return f"{short}_{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def distinct_keys(source: TarSource | FolderSource, num_samples: int) -> list[str]:
    """Keys of the first samples. Raises PreparationError where two are the same."""
    first: dict[str, int] = {}
    for sample in range(num_samples):
        key = source.key(sample)
        if key in first:
            raise PreparationError(_repeated(source, first[key], sample))
        first[key] = sample
    return list(first)


def _repeated(source: TarSource | FolderSource, first: int, second: int) -> str:
    """What to do about two samples with one key."""
    one, two = source.describe(first), source.describe(second)
    if one != two:
        return (
            f"{one} and {two} have the same key {source.key(first)!r} (dots and spaces become _): rename "
            "one, or prepare them into separate outputs"
        )
    if isinstance(source, TarSource):
        return f"{one} is there twice, with others between: write the shard again, sorted by name"
    names = [source.clips[sample].listed for sample in (first, second)]
    return f"{one} is listed twice, as {names[0]!r} and as {names[1]!r}: give both entries one name"


@dataclass(frozen=True)
class TarSource:
    """Clips of WebDataset tars on this machine."""

    shards: ShardSet

    @classmethod
    def open(cls, paths: Sequence[Path]) -> TarSource:
        return cls(ShardSet(paths))

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, sample: int) -> str:
        return safe_key(self.shards[sample].key)

    def identity(self, sample: int) -> str:
        found = self.shards[sample]
        return f"{found.shard.name}:{found.key}"

    def describe(self, sample: int) -> str:
        return str(self.shards[sample])

    def fingerprint(self) -> list:
        """What the plan must know of the input beside the samples' keys and identities."""
        return [[path.name, path.stat().st_size] for path in self.shards.paths]

    def load(self, sample: int) -> SourceClip:
        found = self.shards[sample]
        video, pictures, crop, record = None, (), None, found.record()
        captions = tuple(found.captions(every=True, record=record))
        if found.layout() == "video":
            video, crop = found.read(found.video_extension()), found.crop(record)
        else:
            pictures = tuple(found.read(extension) for extension in found.frame_extensions())
        source = {"shard": found.shard.name}
        return SourceClip(
            video=video, pictures=pictures, captions=captions, source=source, name=found.key, crop=crop
        )


@dataclass(frozen=True)
class FolderSource:
    """Clips of one folder, as a caption file lists them."""

    folder: Path
    clips: tuple[ListedClip, ...]
    keys: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, captions: Path, caption_column: str | None = None) -> FolderSource:
        clips = tuple(list_clips(folder, captions, caption_column))
        names = [clip.file or clip.name for clip in clips]
        keys = [safe_key(os.path.splitext(name)[0]) for name in names]
        times = Counter(keys)
        # Files that differ in their extension alone keep it in the key.
        keys = [safe_key(n) if times[k] > 1 else k for n, k in zip(names, keys, strict=True)]
        return cls(folder, clips, tuple(keys))

    def __len__(self) -> int:
        return len(self.clips)

    def key(self, sample: int) -> str:
        return self.keys[sample]

    def identity(self, sample: int) -> str:
        return self.clips[sample].file or self.clips[sample].name

    def describe(self, sample: int) -> str:
        return f"{self.folder / self.identity(sample)}"

    def fingerprint(self) -> list:
        """What the plan must know of the input beside the samples' keys and identities: the captions."""
        said = json.dumps([clip.captions for clip in self.clips])
        return [hashlib.sha256(said.encode()).hexdigest()]

    def sizes(self, samples: range) -> list[int | str]:
        """Bytes of each sample's file, or why there is none: a shard made of others is out of date."""
        return [self._size(self.clips[sample]) for sample in samples]

    def _size(self, clip: ListedClip) -> int | str:
        if clip.file is None:
            return clip.problem
        try:
            return (self.folder / clip.file).stat().st_size
        except OSError as error:
            return str(error.strerror)

    def load(self, sample: int) -> SourceClip:
        clip = self.clips[sample]
        if clip.file is None:
            raise SampleError(f"{self.folder}: {clip.name!r}: {clip.problem}", clip.problem)
        captions = tuple(caption for caption in clip.captions if caption)
        if not captions:
            cause = "empty caption" if clip.captions else "no caption"
            raise SampleError(f"{self.folder / clip.file}: {cause} in the caption file", cause)
        path = self.folder / clip.file
        image = path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        return SourceClip(
            video=None if image else path,
            pictures=(path,) if image else (),
            captions=captions,
            source={"file": clip.file},
            name=os.path.splitext(clip.file)[0],
        )
