"""The manifest of a checkpoint: size and SHA-256 of every file, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from miles_fast.distributed import gather_objects, rank, world_size
from miles_fast.files import write_whole

MANIFEST = "manifest.json"
FORMAT = "miles_fast-checkpoint/2"
_NAMES = re.compile(
    r"rank-\d{5}\.safetensors|snapshot\.safetensors|state\.json"
    r"|student/(model\.safetensors|model\.json|tokenizer/\w[\w.-]*)"
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or restored; the message names the folder and the remedy."""


def digest(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
        return {"bytes": file.tell(), "sha256": found.hexdigest()}


def write_manifest(folder: Path, files: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest; it comes last, and a folder without one is no checkpoint."""
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, dict[str, int | str]]:
    """Files of a checkpoint by relative name. Raises CheckpointError for a damaged or malicious manifest."""
    path = checkpoint / MANIFEST
    try:
        tree = json.loads(path.read_text())
        files = tree["files"]
        good = tree["format"] == FORMAT and all({"bytes", "sha256"} == set(f) for f in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use an older checkpoint") from error
    if not good:
        raise CheckpointError(f"{path}: format is not {FORMAT!r}; use an older checkpoint")
    strange = [name for name in files if not _NAMES.fullmatch(name)]
    if strange:
        raise CheckpointError(f"{path} names {strange[0]!r}, which no checkpoint holds: do not trust it")
    return files


def check_files(checkpoint: Path, prefix: str = "", *, by_all_ranks: bool = False) -> None:
    """Compare the files whose names begin with `prefix` with the manifest. Raises CheckpointError naming one.

    `by_all_ranks` deals the files out; then all ranks must call it, and all raise.
    """
    files = read_manifest(checkpoint)
    names = sorted(name for name in files if name.startswith(prefix))
    mine = names[rank() :: world_size()] if by_all_ranks else names
    problem = next((text for name in mine if (text := _problem(checkpoint / name, files[name]))), None)
    problems = [text for text in (gather_objects(problem) if by_all_ranks else [problem]) if text]
    if problems:
        raise CheckpointError(f"{problems[0]}; nothing was loaded. Use another checkpoint with --resume")


def _problem(path: Path, entry: dict[str, int | str]) -> str | None:
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        return f"{path} is missing or no plain file"
    if path.stat().st_size != entry["bytes"]:
        return f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
    if digest(path)["sha256"] != entry["sha256"]:
        return f"{path} does not have the SHA-256 of the manifest: it was damaged or altered"
    return None
