"""Spoiled samples (F4, F5): counted by cause, listed once, replaced; the good ones unchanged to the bit."""

import json
import zlib

import numpy as np
import pytest
import torch
import webdataset
from tiny import caption, jpeg, tiny_config, write_data

from miles_fast.data.batches import ENOUGH_SAMPLES, Quarantine
from miles_fast.data.clips import BadSample
from miles_fast.data.loader import EvaluationLoader, Loader
from miles_fast.data.order import Share
from miles_fast.data.shards import ShardError
from miles_fast.models.text_encoder import load_tokenizer

CPU = torch.device("cpu")
NUM_SAMPLES, BATCH = 120, 8


def _flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :]


# What is done to a sample's members -> the causes that may be named for it.
FRAME_FAULTS = {
    "truncated": (lambda m: m | {"01.jpg": m["01.jpg"][:99], "00.jpg": m["00.jpg"][:99]}, {"wrong checksum"}),
    "zero bytes": (lambda m: m | {"00.jpg": b"", "01.jpg": b""}, {"wrong checksum"}),
    "flipped bytes": (lambda m: m | {n: _flip(m[n]) for n in ("00.jpg", "01.jpg")}, {"wrong checksum"}),
    "unchecked and truncated": (
        lambda m: {n: d[:200] if n.endswith("jpg") else d for n, d in m.items() if n != "json"},
        {"truncated"},
    ),
    "wrong extension": (lambda m: {"mp4x": m["00.jpg"], "txt": m["txt"]}, {"no media"}),
    "text for a picture": (
        lambda m: {"00.png": b"<html>", "txt": m["txt"]},
        {"not decodable"},
    ),
    "no caption": (lambda m: {n: d for n, d in m.items() if n != "txt"}, {"no caption"}),
    "json that is none": (lambda m: m | {"json": b"{"}, {"json not readable"}),
}


def frame_members(number):
    images = {f"{t:02d}.jpg": jpeg(10 * number + t) for t in range(2)}
    record = {"width": 56, "height": 40, "crc32": [zlib.crc32(image) for image in images.values()]}
    return {**images, "txt": caption(number).encode(), "json": json.dumps(record).encode()}


VIDEO_FAULTS = {
    "truncated": (lambda m: m | {"mp4": m["mp4"][: len(m["mp4"]) // 2]}, {"not decodable"}),
    "moov missing": (lambda m: m | {"mp4": m["mp4"].replace(b"moov", b"xxxx")}, {"not decodable"}),
    "zero bytes": (lambda m: m | {"mp4": b""}, {"not decodable"}),
    "flipped bytes": (
        lambda m: m | {"mp4": m["mp4"][:40] + _flip(m["mp4"][40:])},
        {"not decodable", "missing frames", "no frames", None},  # some flips decode
    ),
    "not a video": (lambda m: m | {"mp4": b"not a video" * 50}, {"not decodable"}),
    "no caption": (lambda m: {n: d for n, d in m.items() if n != "txt"}, {"no caption"}),
}


def write_spoiled(folder, members_of, faults, share, seed=0):
    """Shards in which `share` of the samples are spoiled; the fault of each by key."""
    folder.mkdir()
    spoiled = {}
    chosen = np.random.default_rng(seed).permutation(NUM_SAMPLES)[: round(share * NUM_SAMPLES)]
    names = list(faults)
    for place, number in enumerate(sorted(chosen.tolist())):
        spoiled[f"{number:04d}"] = names[place % len(names)]
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), encoder=False, mtime=0.0) as writer:
            for number in range(shard, NUM_SAMPLES, 2):
                key, members = f"{number:04d}", members_of(number)
                if key in spoiled:
                    members = faults[spoiled[key]][0](members)
                writer.write({"__key__": key, **members})
    return spoiled


def epoch(root, folder, quarantine, **data):
    """The batches of one epoch."""
    section = {**vars(tiny_config(root).data), "train": [{"shards": [str(folder / "*.tar")]}], **data}
    config = tiny_config(root, data={**section, "evaluation": []})
    dealer = Loader(
        config.data,
        image_size=32,
        tokenizer=load_tokenizer(root / "tokenizer"),
        share=Share(batch=BATCH),
        seed=11,
        device=CPU,
        quarantine=quarantine,
    )
    batches = dealer.batches(0)
    found = [next(batches) for _ in range(NUM_SAMPLES // BATCH)]
    batches.close()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("containment")
    write_data(place, 4)
    write_spoiled(place / "whole", frame_members, FRAME_FAULTS, 0.0)
    return place


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_spoiled_frames_are_replaced_and_the_rest_is_unchanged(root, tmp_path, share):
    spoiled = write_spoiled(tmp_path / "spoiled", frame_members, FRAME_FAULTS, share)
    listed = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(listed)
    with_faults = epoch(root, tmp_path / "spoiled", quarantine)
    without = epoch(root, root / "whole", Quarantine(None))
    met = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {entry["key"] for entry in met} == spoiled.keys() and len(met) == len(spoiled)
    for entry in met:
        assert entry["cause"] in FRAME_FAULTS[spoiled[entry["key"]]][1], entry
        assert f"{int(entry['key']) % 2}.tar" in entry["shard"]
    assert quarantine.counts.total() >= len(spoiled)
    assert not spoiled.keys() & {key for batch in with_faults for key in batch.keys}
    unchanged = 0
    for one, two in zip(without, with_faults, strict=True):
        for row, (was, now) in enumerate(zip(one.keys, two.keys, strict=True)):
            if was not in spoiled:
                unchanged += 1
                assert was == now and torch.equal(one.video_BTCHW[row], two.video_BTCHW[row])
                assert torch.equal(one.token_ids_BL[row], two.token_ids_BL[row])
    assert unchanged == NUM_SAMPLES - len(spoiled)


def test_spoiled_videos_are_replaced(root, tmp_path, encode_video):
    def members_of(number):
        levels = [(number * 31 + 5 * t) % 256 for t in range(10)]
        return {"mp4": encode_video(levels), "txt": caption(number).encode()}

    spoiled = write_spoiled(tmp_path / "spoiled", members_of, VIDEO_FAULTS, 0.1)
    listed = tmp_path / "quarantine.jsonl"
    batches = epoch(root, tmp_path / "spoiled", Quarantine(listed))
    causes = {e["key"]: e["cause"] for e in map(json.loads, listed.read_text().splitlines())}
    for key, fault in spoiled.items():
        assert causes.get(key) in VIDEO_FAULTS[fault][1], (key, fault, causes.get(key))
    bad = causes.keys()
    assert bad <= spoiled.keys() and not bad & {key for batch in batches for key in batch.keys}
    assert all(batch.video_BTCHW.isfinite().all() for batch in batches)


def test_real_awkward_files_never_end_the_run(root, tmp_path, real_clips):
    folder = tmp_path / "edge"
    folder.mkdir()
    manifest = {clip["file"]: clip for clip in json.loads((real_clips / "manifest.json").read_text())}
    paths = sorted(path for path in (real_clips / "edge").iterdir() if path.suffix != ".json")
    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False, mtime=0.0) as writer:
        for number, path in enumerate(paths):
            sample = {"__key__": f"{number:04d}", "mp4": path.read_bytes(), "txt": b"a red dog moves"}
            writer.write(sample)
    data = tiny_config(root).data
    loader = EvaluationLoader(
        tiny_config(
            root, data={**vars(data), "evaluation": [{"shards": [f"{folder}/0.tar"]}]}
        ).data.evaluation[0],
        data,
        image_size=32,
        tokenizer=load_tokenizer(root / "tokenizer"),
        batch=4,
        device=CPU,
    )
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    good = {key for batch in loader.batches(quarantine) for key in batch.keys}
    bad = {json.loads(line)["key"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()}
    assert len(good) + len(bad) == len(paths) and not good & bad
    for number, path in enumerate(paths):
        error = manifest.get(f"edge/{path.name}", {}).get("decode_error")
        if error:
            assert f"{number:04d}" in bad, (path.name, error)


def test_over_the_limit_share_a_short_run_is_warned_once(monkeypatch):
    said = []
    monkeypatch.setattr(
        "miles_fast.data.batches.logger.warning", lambda text, *values: said.append(text % values)
    )
    quarantine = Quarantine(None, max_share=0.5)
    bad = BadSample(key="k", shard="bad/7.tar", cause="truncated", message="")
    quarantine.add([bad] * 4)
    quarantine.accept(4)
    assert not said
    quarantine.add([bad] * 2)
    quarantine.accept(1)
    quarantine.accept(0)
    assert len(said) == 1 and said[0].startswith(
        "6 of 11 samples are unusable ({'truncated': 6}), more than data.max_bad_share (0.5): the run stops"
    )
    assert str(ENOUGH_SAMPLES) in said[0]


def test_over_the_limit_share_the_run_stops_and_names_the_shard(root, tmp_path):
    quarantine = Quarantine(None, max_share=0.5)
    bad = BadSample(key="k", shard="bad/7.tar", cause="truncated", message="")
    quarantine.add([bad] * (ENOUGH_SAMPLES // 2 + 1))
    quarantine.accept(ENOUGH_SAMPLES // 2 - 2)  # too few samples to judge
    with pytest.raises(ShardError, match=r"501 of 1000 .*truncated.*bad/7.tar.*data.max_bad_share \(0.5\)"):
        quarantine.accept(1)
    half = Quarantine(None, max_share=0.5)
    half.add([bad] * ENOUGH_SAMPLES)
    half.accept(ENOUGH_SAMPLES)
