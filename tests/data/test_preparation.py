from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import prepare as program
from miles_fast.data import preparation, shard_writing
from miles_fast.data.clip_list import ClipListError
from miles_fast.data.clip_sources import safe_key
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.shards import ShardError, ShardSet

LEVELS = [10 + 20 * n for n in range(12)]


def alone(**options) -> PreparationOptions:
    return PreparationOptions(**{"workers": 1, "frames": 4, "short_side": 32} | options)


@pytest.fixture(scope="module")
def clip(encode_video) -> bytes:
    return encode_video(LEVELS)


@pytest.fixture
def tars(tmp_path, write_tar, clip) -> list[Path]:
    """Ten samples in two tars; one broken video, one without a caption."""
    paths = []
    for tar in range(2):
        members = []
        for sample in range(5):
            key = f"k{tar}{sample}"
            members.append((f"{key}.mp4", b"broken" if key == "k03" else clip))
            if key != "k11":
                members.append((f"{key}.txt", f"caption of {key}".encode()))
        paths.append(write_tar(tmp_path / f"videos{tar}.tar", members))
    return paths


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("0*"))}


def test_tars_become_frame_shards(tars, tmp_path):
    summary = prepare(tars, tmp_path / "out", alone(samples_per_shard=4))
    assert (summary.kept, summary.dropped) == (8, {"no caption": 1, "not decodable": 1})
    assert [path.name for path in summary.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert summary.num_bytes == sum(path.stat().st_size for path in summary.shards)
    shards = ShardSet(summary.shards, missing_index="error")
    assert [shards[i].key for i in range(8)] == ["k00", "k01", "k02", "k04", "k10", "k12", "k13", "k14"]
    assert shards[0].extensions == ("00.jpg", "01.jpg", "02.jpg", "03.jpg", "json", "txt")
    assert shards[3].captions() == ["caption of k04"]
    jpegs = [shards[0].read(f"0{n}.jpg") for n in range(4)]
    assert pixels(jpegs[0]).shape == (32, 43, 3)
    assert [float(pixels(j).mean()) for j in jpegs] == pytest.approx(
        [LEVELS[n] for n in (1, 4, 7, 10)], abs=2
    )
    record = json.loads(shards[0].read("json"))
    assert record["crc32"] == [zlib.crc32(j) for j in jpegs]
    assert (record["key"], record["num_frames"], record["width"], record["height"]) == ("k00", 4, 43, 32)
    assert record["timestamps_seconds"] == pytest.approx([n / 30 for n in (1, 4, 7, 10)], abs=1e-3)
    source = record["source"]
    assert (source["shard"], source["codec"], source["num_frames"]) == ("videos0.tar", "h264", 12)
    assert (source["width"], source["height"]) == (64, 48)
    assert source["duration_seconds"] == pytest.approx(0.4, abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["cause"]) for line in lines] == [
        ("k03", "not decodable"),
        ("k11", "no caption"),
    ]
    assert lines[0]["source"] == "videos0.tar:k03"
    assert json.loads((tmp_path / "out/summary.json").read_text())["dropped"] == summary.dropped
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_same_input_same_bytes_for_any_workers(tars, tmp_path):
    prepare(tars, tmp_path / "one", alone(samples_per_shard=4))
    prepare(tars, tmp_path / "two", alone(samples_per_shard=4, workers=2))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) == 6


def test_resume_keeps_finished_shards(tars, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(tars, tmp_path / "whole", alone(samples_per_shard=4))
    write_shard = shard_writing._write_shard

    def stop_at_two(job, number, samples, tell):
        if number == 2:
            raise KeyboardInterrupt
        return write_shard(job, number, samples, tell)

    monkeypatch.setattr(shard_writing, "_write_shard", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        prepare(tars, out, alone(samples_per_shard=4))
    os.truncate(out / "00001.tar", 100)
    times = (out / "00000.tar").stat().st_mtime_ns
    written = []
    monkeypatch.setattr(
        shard_writing,
        "_write_shard",
        lambda job, number, samples, tell: (
            written.append(number),
            write_shard(job, number, samples, tell),
        )[1],
    )
    summary = prepare(tars, out, alone(samples_per_shard=4))
    assert written == [1, 2] and summary.kept == 8
    assert (out / "00000.tar").stat().st_mtime_ns == times
    assert digests(out) == digests(tmp_path / "whole")


def test_another_plan_is_refused(tars, tmp_path):
    prepare(tars, tmp_path / "out", alone())
    with pytest.raises(PreparationError, match=r"'frames': 4.*'frames': 5.*delete"):
        prepare(tars, tmp_path / "out", alone(frames=5))
    with pytest.raises(PreparationError, match="5 samples.*10 samples|10 samples.*5 samples"):
        prepare(tars[:1], tmp_path / "out", alone())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/precious.tar").write_bytes(b"x")
    with pytest.raises(PreparationError, match="already holds precious.tar"):
        prepare(tars, tmp_path / "theirs", alone())


def test_changed_captions_are_another_plan(folder, tmp_path):
    (tmp_path / "c.csv").write_text("file,caption\none.two.mp4,said\n")
    prepare([folder], tmp_path / "out", alone(), tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("file,caption\none.two.mp4,corrected\n")
    with pytest.raises(PreparationError, match="captions or their tars have changed: name another output"):
        prepare([folder], tmp_path / "out", alone(), tmp_path / "c.csv")


def test_mended_files_are_prepared_again(folder, tmp_path, encode_video, monkeypatch, caplog):
    listed, out, absent = tmp_path / "c.csv", tmp_path / "out", folder / "absent.mp4"
    listed.write_text("file,caption\none.two.mp4,a\nstill.png,b\nabsent.mp4,c\nbroken.jpg,d\n")
    options = alone(samples_per_shard=2)
    written = []
    write_shard = shard_writing._write_shard

    def watched(job, number, samples, tell):
        written.append(number)
        return write_shard(job, number, samples, tell)

    monkeypatch.setattr(shard_writing, "_write_shard", watched)

    def prepared() -> tuple[list[int], dict[str, int]]:
        written.clear()
        caplog.clear()
        dropped = prepare([folder], out, options, listed).dropped
        return list(written), dropped

    nothing = {"file missing": 1, "not decodable": 1}
    assert prepared() == ([0, 1], nothing)
    assert prepared() == ([], nothing) and not caplog.records
    absent.write_bytes(encode_video(LEVELS[:4]))
    assert prepared() == ([1], {"not decodable": 1})
    assert "00001.tar is written again: absent.mp4 changed" in caplog.text
    (folder / "one.two.mp4").write_bytes(encode_video(LEVELS[:6]))
    assert prepared() == ([0], {"not decodable": 1})
    prepare([folder], tmp_path / "fresh", options, listed)
    assert digests(out) == digests(tmp_path / "fresh") and len(digests(out)) == 4
    absent.unlink()
    assert prepared() == ([1], nothing)
    assert sorted(digests(out)) == ["00000.idx", "00000.tar"]
    for path in (out / ".records").glob("0*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in record.items() if name != "sizes"}))
    absent.write_bytes(encode_video(LEVELS[:4]))
    assert prepared() == ([], nothing)


def test_limit(tars, tmp_path):
    assert prepare(tars, tmp_path / "out", alone(limit=3)).kept == 3


def test_nothing_usable(tmp_path, write_tar):
    tar = write_tar(tmp_path / "x.tar", [("a.mp4", b"broken"), ("a.txt", b"said")])
    with pytest.raises(PreparationError, match="none of 1 samples.*not decodable.*quarantine.jsonl"):
        prepare([tar], tmp_path / "out", alone())
    assert json.loads((tmp_path / "out/summary.json").read_text())["not_written"] == ["00000.tar"]
    assert not (tmp_path / "out/00000.tar").exists()


def test_full_disk(tars, tmp_path, monkeypatch):
    encode = shard_writing.encode_clip

    def full(key, clip, options):
        if key == "k10":
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(key, clip, options)

    monkeypatch.setattr(shard_writing, "encode_clip", full)
    with pytest.raises(PreparationError, match="disk is full; finished shards are kept"):
        prepare(tars, tmp_path / "out", alone(samples_per_shard=5))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".records",
        "00000.idx",
        "00000.tar",
    ]
    monkeypatch.setattr(shard_writing, "encode_clip", encode)
    assert prepare(tars, tmp_path / "out", alone(samples_per_shard=5)).kept == 8


def test_short_clips_keep_each_frame_once(tmp_path, write_tar, encode_video):
    tar = write_tar(tmp_path / "x.tar", [("a.mp4", encode_video([10, 100, 200])), ("a.txt", b"said")])
    shards = ShardSet(prepare([tar], tmp_path / "out", alone(frames=8, short_side=256)).shards)
    assert shards[0].frame_extensions() == ("00.jpg", "01.jpg", "02.jpg")
    assert [float(pixels(shards[0].read(e)).mean()) for e in shards[0].frame_extensions()] == pytest.approx(
        [10, 100, 200], abs=2
    )
    assert pixels(shards[0].read("00.jpg")).shape == (48, 64, 3)


def test_frames_are_chosen_by_the_time_they_are_shown(tmp_path, write_tar, encode_video):
    # Ten frames in the first third of a second, then two that stand for a second each.
    times = [*range(10), 30, 60]
    video = encode_video(LEVELS, container="matroska", times=times)
    tar = write_tar(tmp_path / "x.tar", [("a.mkv", video), ("a.txt", b"said")])
    shards = ShardSet(prepare([tar], tmp_path / "out", alone(frames=4)).shards)
    record = shards[0].record()
    assert record["timestamps_seconds"] == pytest.approx([t / 30 for t in (7, 9, 30, 30)], abs=2e-3)
    assert pixels(shards[0].read("02.jpg")).mean() == pytest.approx(LEVELS[10], abs=2)


def test_frames_by_rate(tmp_path, write_tar, encode_video):
    long, short = encode_video([10 + n for n in range(90)]), encode_video(LEVELS[:2])
    members = [("a.mp4", long), ("a.txt", b"said"), ("b.mp4", short), ("b.txt", b"said")]
    tar = write_tar(tmp_path / "x.tar", members)
    shards = ShardSet(prepare([tar], tmp_path / "two", alone(fps=2)).shards)
    seconds = shards[0].record()["timestamps_seconds"]
    assert seconds == pytest.approx([(7 + 15 * n) / 30 for n in range(6)], abs=1e-3)
    assert len(shards[1].frame_extensions()) == 1
    shards = ShardSet(prepare([tar], tmp_path / "four", alone(fps=2, max_frames=3)).shards)
    assert shards[0].record()["timestamps_seconds"] == pytest.approx([14 / 30, 44 / 30, 74 / 30], abs=1e-3)


def test_prepared_shards_can_be_prepared_again(tars, tmp_path):
    first = prepare(tars, tmp_path / "first", alone()).shards
    shards = ShardSet(prepare(first, tmp_path / "second", alone(frames=2, short_side=16)).shards)
    assert len(shards) == 8 and shards[0].captions() == ["caption of k00"]
    assert [float(pixels(shards[0].read(f"0{n}.jpg")).mean()) for n in range(2)] == pytest.approx(
        [LEVELS[1], LEVELS[7]], abs=3
    )


@pytest.fixture
def folder(tmp_path, clip) -> Path:
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.two.mp4").write_bytes(clip)
    (folder / "deep" / "-dash.mp4").write_bytes(clip)
    Image.new("RGBA", (100, 60), (0, 0, 255, 0)).save(folder / "still.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8broken")
    return folder


def test_folder_with_csv(folder, tmp_path):
    listed = tmp_path / "captions.csv"
    listed.write_text(
        'file,caption\none.two.mp4,"a, b"\none.two.mp4,second\n-dash,dash\nstill,still\nbroken.jpg,x\n'
        "absent.mp4,x\n../secret.mp4,x\n"
    )
    summary = prepare([folder], tmp_path / "out", alone(), listed)
    assert summary.dropped == {"file missing": 1, "file outside folder": 1, "not decodable": 1}
    shards = ShardSet(summary.shards)
    assert [shards[i].key for i in range(3)] == ["one_two", "deep/-dash", "still"]
    assert shards[0].captions() == ["a, b"] and shards[0].captions(every=True) == ["a, b", "second"]
    assert json.loads(shards[0].read("json"))["source"]["name"] == "one.two"
    assert json.loads(shards[0].read("json"))["source"]["file"] == "one.two.mp4"
    still = pixels(shards[2].read("00.jpg"))
    assert still.shape == (32, 53, 3) and still.min() >= 254
    assert shards[2].frame_extensions() == ("00.jpg",)


@pytest.mark.parametrize(
    "name, text",
    [
        ("c.tsv", "path\tcaption\none.two.mp4\tsaid\n"),
        ("c.csv", "videoid,name,page_dir\none.two,said,x\n"),
        ("c.json", '[{"video": "one.two.mp4", "caption": ["said"]}]'),
        ("c.jsonl", '{"file": "one.two.mp4", "caption": "said", "w": 3}\n\n'),
    ],
)
def test_caption_files(folder, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    shards = ShardSet(prepare([folder], tmp_path / "out", alone(), tmp_path / name).shards)
    assert (shards[0].key, shards[0].captions()) == ("one_two", ["said"])


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("c.csv", "", "names no clips"),
        ("c.csv", "file,text\na,b\n", "entry 1 needs one of file.*and caption"),
        ("c.csv", "caption\nb\n", "entry 1 needs"),
        ("c.json", "{", "is not json"),
        ("c.json", "[3]", "entry 1 needs"),
        ("c.jsonl", "{}\n{", "is not jsonl"),
        ("c.txt", "a b", "end in .csv"),
    ],
)
def test_bad_caption_files(folder, tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ClipListError, match=f"(?s){name}.*{problem}"):
        prepare([folder], tmp_path / "out", alone(), tmp_path / name)


def test_bad_inputs(folder, tars, tmp_path, write_tar):
    with pytest.raises(PreparationError, match="is a folder: give one folder and `--captions"):
        prepare([folder], tmp_path / "out", alone())
    with pytest.raises(PreparationError, match="goes with a folder"):
        prepare(tars, tmp_path / "out", alone(), tmp_path / "c.csv")
    with pytest.raises(ShardError, match="no shard matches"):
        prepare([tmp_path / "absent*.tar"], tmp_path / "out", alone())
    with pytest.raises(ClipListError, match="cannot be read"):
        prepare([folder], tmp_path / "out", alone(), tmp_path / "absent.csv")
    twice = write_tar(tmp_path / "twice.tar", [("k00.mp4", b""), ("k00.txt", b"x")])
    with pytest.raises(PreparationError, match=r"twice.tar.*videos0.tar.*same key 'k00'"):
        prepare([*tars, twice], tmp_path / "out", alone())
    apart = write_tar(tmp_path / "apart.tar", [("a.mp4", b""), ("b.mp4", b""), ("a.txt", b"x")])
    with pytest.raises(PreparationError, match=r"apart.tar: sample 'a' is there twice.*sorted by name"):
        prepare([apart], tmp_path / "out", alone())
    with pytest.raises(PreparationError, match="nowhere: there is no such folder.*correct the path"):
        prepare([tmp_path / "nowhere"], tmp_path / "out", alone(), tmp_path / "c.csv")
    for other in ("-dash", "./deep/-dash.mp4"):
        (tmp_path / "c.csv").write_text(f"file,caption\ndeep/-dash.mp4,x\n{other},y\n")
        named = f"-dash.mp4 is listed twice, as 'deep/-dash.mp4' and as '{other}'"
        with pytest.raises(PreparationError, match=named):
            prepare([folder], tmp_path / "out", alone(), tmp_path / "c.csv")
    with pytest.raises(PreparationError, match="videos0.tar is no folder: name another output"):
        prepare(tars, tars[0], alone())
    (tmp_path / "c.csv").write_text("file,caption\ndeep/-dash.mp4,x\n")
    before = sorted(folder.rglob("*"))
    with pytest.raises(PreparationError, match="is the folder of the clips: name another output"):
        prepare([folder], folder / "deep" / "..", alone(), tmp_path / "c.csv")
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").touch()
    with pytest.raises(PreparationError, match="already holds summary.json: name another"):
        prepare(tars, tmp_path / "mine", alone())
    for name in ("frames", "max_frames", "fps", "samples_per_shard", "workers", "limit"):
        with pytest.raises(PreparationError, match=name):
            alone(**{name: 0})
    with pytest.raises(PreparationError, match="quality is 101"):
        alone(quality=101)


def test_keys():
    assert safe_key("a.b c/d.e") == "a_b_c/d_e"
    long = safe_key("x" * 200)
    assert len(long.encode()) == 80 and long != safe_key("x" * 201)
    assert len(safe_key("ü" * 200).encode()) <= 80


def test_command(tars, tmp_path):
    root = Path(preparation.__file__).resolve().parents[2]
    command = [sys.executable, str(root / "launch/prepare.py"), str(tmp_path / "videos*.tar")]
    options = ["--output", str(tmp_path / "out"), "--frames", "2", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command + options, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 clips in 1 shards")
    again = subprocess.run(
        [*command, *options, "--quality", "80"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 1 and again.stderr.startswith("prepare: ") and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["videos*.tar", "--output", "videos0.tar"], "videos0.tar is no folder"),
        (["videos*.tar", "--output", "videos0.tar/out"], "Not a directory"),
        (["videos*.tar", "--output", "/proc/x"], "/proc/x"),
        (["clips", "--look", "--output", "page.html"], "clips is a folder: write 'clips/*.tar'"),
        (["videos*.tar", "--look", "--output", "clips"], "--output clips is a folder: name a page in it"),
        (["videos*.tar", "--look", "--output", "videos0.tar/page.html"], "videos0.tar"),
        (["videos*.tar", "--look", "--output", "videos0.tar"], "--look writes a page, name it .html"),
    ],
)
def test_mistakes_end_the_program_in_one_line(tars, folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    assert program.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("prepare: ") and message in said and said.count("\n") == 1


def test_real_manifest(real_clips, tmp_path):
    summary = prepare([real_clips], tmp_path / "out", alone(limit=8), real_clips / "manifest.json")
    entries = json.loads((real_clips / "manifest.json").read_text())[:8]
    assert summary.kept + sum(summary.dropped.values()) == 8
    shards = ShardSet(summary.shards)
    said = {entry["caption"] for entry in entries}
    assert {shards[i].captions()[0] for i in range(len(shards))} <= said
