"""The loader on the same clips in other forms: by every decoder in turn, and with a share of them spoiled."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_rivals import clips_per_second
from loader_stages import WARMUP, open_loader

from miles_fast.config import Config
from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.data.sources import open_shards

SPOILED_SHARES = (0.0, 0.01, 0.1, 0.5)


def time_decoders(
    config: Config, batch: int, seconds: float, videos: Sequence[str], folder: Path, device: torch.device
) -> dict[str, Any]:
    """Clips/s of the loader from the same video shards: prepared in each way, and decoded in each way.

    Each way has about `seconds`, since the slowest take a hundred times as long as the fastest. The prepared
    shards go to `folder`, where those of an earlier call are found again. NVDEC's rows are left out without a
    GPU.
    """
    forms = {"raw": list(videos)}
    for layout in ("frames", "remux", "transcode"):
        prepare(videos, folder / layout, PreparationOptions(layout=layout, samples_per_shard=40))
        forms[layout] = [str(folder / layout / "*.tar")]
    rows = [("frames", "cpu"), ("raw", "cpu"), ("transcode", "cpu")]
    if device.type == "cuda":
        rows[1:1] = [(form, "nvdec") for form in ("raw", "remux", "transcode")]
    figures: dict[str, Any] = {}
    for form, decoder in rows:
        data = replace(_data_of(config, forms[form]), video_decoder=decoder)
        name = form if form == "frames" else f"{form} {'NVDEC' if decoder == 'nvdec' else 'PyAV'}"
        loader = open_loader(replace(config, data=data), batch, device)
        with contextlib.closing(loader.batches(0)) as stream:
            rate = figures[f"{name} clips/s"] = clips_per_second(stream, batch, seconds)
        bad = dict(loader.quarantine.counts)
        print(f"{name:<40}{rate:>12.3f} clips/s {bad or ''}", flush=True)
    return figures


def time_spoiled(
    config: Config, batch: int, batches: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Clips/s of the loader with shares of the first source's frames spoiled.

    Medians of as many rounds as there are shares, each of which begins with another one: a round's first run
    may find another machine than its last.
    """
    shards = open_shards(config.data.train[0], config.data)
    configs, shares = [], []
    for share in SPOILED_SHARES:
        place = folder / f"spoiled_{share}"
        shares.append(spoil_frames(shards.paths, place, share))
        configs.append(replace(config, data=_data_of(config, [str(place / "*.tar")])))
    rates: list[list[float]] = [[] for _ in configs]
    for first in range(len(configs)):
        for number in [*range(first, len(configs)), *range(first)]:
            rates[number].append(_clips_per_second(configs[number], batch, batches, device))
    clean = statistics.median(rates[0])
    figures: dict[str, Any] = {}
    for share, found in zip(shares, rates, strict=True):
        name, rate = f"spoiled {100 * share:.1f} %", statistics.median(found)
        figures |= {f"{name} clips/s": rate, f"{name}, slowest": min(found), f"{name}, fastest": max(found)}
        if share:
            figures[f"{name}, slower by %"] = 100 * (1 - rate / clean)
    return figures


def spoil_frames(tars: Sequence[Path], folder: Path, share: float) -> float:
    """Copy shards with all JPEGs of `share` of the samples cut, emptied or reversed; the exact share."""
    folder.mkdir()
    faults = (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[::-1])
    samples = sorted({(path, _key(name)) for path in tars for name in tarfile.open(path).getnames()})
    chosen = np.random.default_rng(0).permutation(len(samples))[: math.ceil(share * len(samples))]
    spoiled = {samples[number]: faults[number % len(faults)] for number in chosen}
    for path in tars:
        with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as copy:
            for member in source:
                data = source.extractfile(member).read()
                spoil = spoiled.get((path, _key(member.name)))
                if spoil and member.name.endswith("jpg"):
                    data = spoil(data)
                member.size = len(data)
                copy.addfile(member, io.BytesIO(data))
    return len(spoiled) / len(samples)


def _key(member: str) -> str:
    return member.partition(".")[0]


def _data_of(config: Config, shards: list[str]) -> Any:
    source = replace(config.data.train[0], shards=shards)
    return replace(config.data, train=(source,), max_bad_share=1.0)


def _clips_per_second(config: Config, batch: int, batches: int, device: torch.device) -> float:
    loader = open_loader(config, batch, device)
    with contextlib.closing(loader.batches(0)) as stream:
        for _ in range(max(WARMUP, batches // 5)):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return batch * batches / (time.perf_counter() - start)
