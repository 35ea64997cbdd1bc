"""Builders of shards that nobody should have to trust; nothing of them is kept in the repository."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tiny import jpeg


class Bomb:
    """Pickled, it creates a file when somebody loads it."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)


def _member(archive: tarfile.TarFile, name: str, data: bytes = b"x", **header) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def _write(path: Path, *members: tuple[str, bytes, dict]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data, header in members:
            _member(archive, name, data, **header)
    return path


def good(path: Path, *names: str) -> Path:
    """A shard of image samples that nothing is wrong with."""
    members = [((f"{n}.jpg", jpeg(i), {}), (f"{n}.txt", b"a dog", {})) for i, n in enumerate(names or ["a"])]
    return _write(path, *(member for pair in members for member in pair))


def named(name: str) -> Callable[[Path], Path]:
    return lambda path: _write(path, ("a.txt", b"said", {}), (name, b"x", {}))


def typed(kind: bytes, target: str = "/etc/passwd") -> Callable[[Path], Path]:
    header = {"type": kind, "linkname": target, "size": 0}
    return lambda path: _write(path, ("a.txt", b"said", {}), ("a.jpg", b"", header))


def duplicate(path: Path) -> Path:
    return _write(path, ("a.txt", b"one", {}), ("a.jpg", jpeg(0), {}), ("a.txt", b"two", {}))


def duplicate_far_apart(path: Path) -> Path:
    return _write(path, ("a.txt", b"one", {}), ("b.txt", b"said", {}), ("a.txt", b"two", {}))


def sized(size: int, name: str = "a.jpg", kind: bytes = tarfile.REGTYPE) -> Callable[[Path], Path]:
    """A header that promises (or takes back) more than there is."""

    def build(path: Path) -> Path:
        header = tarfile.TarInfo(name)
        header.size, header.type = size, kind
        with tarfile.open(good(path)) as archive:
            archive.getmembers()
            end = archive.offset
        block = header.tobuf(tarfile.GNU_FORMAT)[-512:]
        path.write_bytes(path.read_bytes()[:end] + block + bytes(10240))
        return path

    return build


def extended_headers(path: Path) -> Path:
    """A chain of extended headers, each about the next one."""
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    block = header.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(block * 5000 + bytes(1024))
    return path


def huge_image(kind: str) -> bytes:
    """A few bytes that say they are 65535 x 65535 pixels."""
    if kind == "jpg":
        data = bytearray(jpeg(0))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = b"\xff" * 4
        return bytes(data)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    picture = file.getvalue()
    header = b"IHDR" + struct.pack(">II", 65535, 65535) + picture[24:29]
    return picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture[33:]


def with_huge_image(path: Path, kind: str, checked: bool) -> Path:
    """A shard of such an image; `checked`: KEY.json has its checksum, and another size."""
    data = huge_image(kind)
    members = [(f"a.{kind}", data, {}), ("a.txt", b"a dog", {})]
    if checked:
        record = {"crc32": [zlib.crc32(data)], "width": 56, "height": 40}
        members.append(("a.json", json.dumps(record).encode(), {}))
    return _write(path, *members)


def with_pickles(path: Path, proof: Path) -> Path:
    """A good sample beside members that other loaders would unpickle."""
    bomb = pickle.dumps(Bomb(proof))
    extensions = ("pyd", "pkl", "pickle", "pth", "npy", "json.pkl")
    return _write(
        path,
        ("a.jpg", jpeg(0), {}),
        ("a.txt", b"a dog", {}),
        *((f"a.{extension}", bomb, {}) for extension in extensions),
    )


SHARDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absolute": (named("/etc/a.jpg"), "leaves the archive"),
    "parent": (named("../a.jpg"), "leaves the archive"),
    "parent inside": (named("b/../../a.jpg"), "leaves the archive"),
    "symbolic link": (typed(tarfile.SYMTYPE), "link, device"),
    "hard link": (typed(tarfile.LNKTYPE, "a.txt"), "link, device"),
    "character device": (typed(tarfile.CHRTYPE), "link, device"),
    "block device": (typed(tarfile.BLKTYPE), "link, device"),
    "fifo": (typed(tarfile.FIFOTYPE), "link, device"),
    "duplicate": (duplicate, "'a.txt' is there twice"),
    "duplicate far apart": (duplicate_far_apart, "'a.txt' is there twice"),
    "five gigabytes": (sized(5 << 30, "b.mp4"), "the limit of its kind"),
    "an exabyte": (sized(1 << 60, "b.mp4"), "the limit of its kind"),
    "long caption": (sized(17 << 20, "b.txt"), "the limit of its kind"),
    "negative size": (sized(-2048), "the limit of its kind"),
    "negative folder": (sized(-2048, "b", tarfile.DIRTYPE), "not a complete|the limit of its kind|no end"),
    "an exabyte of name": (sized(1 << 60, "b", tarfile.GNUTYPE_LONGNAME), "not a complete"),
    "extended headers": (extended_headers, "not a complete"),
}
