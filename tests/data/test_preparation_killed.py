"""Preparation as a process that is killed, goes on, and is the only one of its kind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles_fast.data import preparation
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.shards import ShardSet

ROOT = Path(preparation.__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tar(tmp_path_factory, write_tar, encode_video) -> Path:
    videos = [encode_video([start + 2 * n for n in range(60)], size=(320, 240)) for start in range(5)]
    members = []
    for sample in range(40):
        members += [(f"k{sample:02d}.mp4", b"broken" if sample == 13 else videos[sample % 5])]
        members += [(f"k{sample:02d}.txt", f"caption of {sample}".encode())]
    return write_tar(tmp_path_factory.mktemp("killed") / "videos.tar", members)


def command(tar: Path, output: Path) -> list[str]:
    options = ["--frames", "8", "--samples-per-shard", "3", "--workers", "2"]
    return [sys.executable, str(ROOT / "launch/prepare.py"), str(tar), "--output", str(output), *options]


def files(folder: Path) -> dict[str, str]:
    """Digest of every file but the one that tells how long it took."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json"
    }


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tar, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = {"env": environment, "cwd": tmp_path, "timeout": 120, "check": True, "capture_output": True}
    subprocess.run(command(tar, tmp_path / "whole"), **run)
    out, rng = tmp_path / "out", random.Random(0)
    finished, killed = set(), 0
    for kill in range(4):
        process = subprocess.Popen(
            command(tar, out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wanted = len(finished) + kill % 3  # from before the first new shard to well inside
        while process.poll() is None and len(list(out.glob("*.tar"))) < wanted:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))  # the shards left take some tenths of a second
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert finished <= set(now)
        finished = set(now)
    assert killed >= 3
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    subprocess.run(command(tar, out), **run)
    assert files(out) == files(tmp_path / "whole")
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    keys = [sample.key for sample in map(ShardSet(sorted(out.glob("*.tar"))).__getitem__, range(39))]
    assert keys == [f"k{n:02d}" for n in range(40) if n != 13]
    kept = [name for name, when in times.items() if (out / name).stat().st_mtime_ns == when]
    assert len(kept) >= len(times) - 2  # at most the shards whose records were not yet written are redone


def test_workers_end_with_a_killed_preparation(tar, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MILES_FAST_TEST": str(tmp_path)}
    process = subprocess.Popen(command(tar, tmp_path / "out"), env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("out/*.tar")):
        time.sleep(0.01)

    def alive() -> int:
        mark, count = f"MILES_FAST_TEST={tmp_path}".encode(), 0
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                count += mark in entry.read_bytes().split(b"\0")
            except OSError:
                continue
        return count

    assert alive() > 1
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive() == 0


def test_two_preparations_do_not_share_an_output(tar, tmp_path, monkeypatch):
    def second(*arguments, **options):
        with pytest.raises(PreparationError, match="another preparation is writing there"):
            prepare([tar], tmp_path / "out", wanted)
        return write(*arguments, **options)

    write = preparation.write_shards
    monkeypatch.setattr(preparation, "write_shards", second)
    wanted = PreparationOptions(workers=1, frames=1, limit=2)
    assert prepare([tar], tmp_path / "out", wanted).kept == 2
