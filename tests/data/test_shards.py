from __future__ import annotations

import json
import os
import pickle
import tarfile
import threading

import pytest

from miles_fast.data import shards as shards_module
from miles_fast.data.shards import SampleError, ShardError, ShardSet, build_index, expand_shards

MEMBERS = [
    ("a.00.jpg", b"first"),
    ("a.01.jpg", b"second frame"),
    ("a.json", b'{"caption": "from json"}'),
    ("a.txt", b" a red ball \n"),
    ("deep/b.mp4", b"v" * 1000),
    ("deep/b.json", b'{"captions": ["one", "", "two"]}'),
    ("c.JPG", b"picture"),
    ("c.txt", b""),
]


@pytest.fixture
def tar(tmp_path, write_tar):
    return write_tar(tmp_path / "00000.tar", MEMBERS)


def test_index_is_what_wds2idx_writes(tar, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert build_index(tar).read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_index_text(tar):
    lines = build_index(tar).read_text().splitlines()
    assert lines[0] == "v1.2 3"
    assert lines[3] == "JPG 7168 7 c.JPG txt 8192 0 c.txt"
    assert not list(tar.parent.glob("*.partial"))


@pytest.mark.parametrize("rebuilt", [True, False])
def test_reads_what_the_tar_holds(tar, rebuilt):
    if rebuilt:
        build_index(tar)
    shards = ShardSet([tar])
    assert len(shards) == 3
    assert [shards[i].key for i in range(3)] == ["a", "deep/b", "c"]
    assert shards[0].extensions == ("00.jpg", "01.jpg", "json", "txt")
    assert [shards[i].layout() for i in range(3)] == ["frames", "video", "image"]
    assert shards[0].frame_extensions() == ("00.jpg", "01.jpg")
    assert shards[2].frame_extensions() == ("JPG",)
    assert shards[1].video_extension() == "mp4"
    keys = {"a": 0, "deep/b": 1, "c": 2}
    for name, data in MEMBERS:
        key, _, extension = name.partition(".")
        assert shards[keys[key]].read(extension) == data


def test_several_shards_and_processes(tmp_path, write_tar):
    paths = [
        write_tar(tmp_path / f"{n}.tar", [(f"k{n}{i}.txt", f"{n}-{i}".encode()) for i in range(n + 1)])
        for n in range(3)
    ]
    shards = ShardSet(paths)
    expected = ["0-0", "1-0", "1-1", "2-0", "2-1", "2-2"]
    assert [shards[i].captions()[0] for i in range(6)] == expected
    assert [shards[i].shard for i in range(6)] == [paths[n] for n in (0, 1, 1, 2, 2, 2)]
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy[i].read("txt").decode() for i in range(6)] == expected
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match="shard set of 6"):
            shards[wrong]


def test_threads_share_few_descriptors(tmp_path, write_tar, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    paths = [write_tar(tmp_path / f"{n}.tar", [("k.txt", b"%d" % n)]) for n in range(8)]
    shards = ShardSet(paths)
    wrong = []

    def read():
        wrong.extend(n for n in list(range(8)) * 20 if shards[n].read("txt") != b"%d" % n)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(shards._open) == 2


def test_frames_are_ordered_by_number(tmp_path, write_tar):
    names = ["k.100.jpg", "k.99.jpg", "k.7.jpg"]
    shards = ShardSet([write_tar(tmp_path / "x.tar", [(name, b"") for name in names])])
    assert shards[0].frame_extensions() == ("7.jpg", "99.jpg", "100.jpg")


@pytest.mark.parametrize(
    "members, every, expected",
    [
        ({"txt": b" said \n"}, False, ["said"]),
        ({"txt": b"said", "json": b'{"captions": ["x", "y"]}'}, False, ["said"]),
        ({"txt": b"said", "json": b'{"captions": ["x", "y"]}'}, True, ["x", "y"]),
        ({"txt": b"said", "json": b"not json"}, False, ["said"]),
        ({"json": b'{"caption": "x"}'}, False, ["x"]),
        ({"json": b'{"captions": ["x ", 3, ""]}'}, False, ["x"]),
        ({"txt": "schön".encode()}, False, ["schön"]),
    ],
)
def test_captions(tmp_path, write_tar, members, every, expected):
    tar = write_tar(tmp_path / "x.tar", [(f"k.{e}", data) for e, data in members.items()])
    assert ShardSet([tar])[0].captions(every=every) == expected


@pytest.mark.parametrize(
    "members, cause",
    [
        ({"mp4": b"v"}, "no caption"),
        ({"txt": b" \n"}, "empty caption"),
        ({"txt": b"\xff\xfe"}, "caption not readable"),
        ({"json": b'{"caption": ""}'}, "empty caption"),
        ({"json": b'{"caption": 3}'}, "no caption"),
        ({"json": b"[1]"}, "no caption"),
        ({"json": b'{"captions": []}'}, "no caption"),
        ({"json": b"{"}, "json not readable"),
        ({"json": b"[" * 100_000}, "json not readable"),
    ],
)
def test_bad_captions_have_a_cause(tmp_path, write_tar, members, cause):
    shards = ShardSet([write_tar(tmp_path / "x.tar", [(f"k.{e}", data) for e, data in members.items()])])
    with pytest.raises(SampleError, match="x.tar: sample 'k'") as raised:
        shards[0].captions()
    assert raised.value.cause == cause
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.cause) == (str(raised.value), cause)


def test_dots_in_keys_are_named(tmp_path, write_tar):
    shards = ShardSet([write_tar(tmp_path / "x.tar", [("k.15.mp4", b""), ("k.16.mp4", b"")])])
    with pytest.raises(SampleError, match="first dot") as raised:
        shards[0].layout()
    assert raised.value.cause == "no media"
    with pytest.raises(SampleError, match="no member 'txt'"):
        shards[0].read("txt")


def _truncate(tar, size):
    with open(tar, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("size", [0, 100, 700, 512, 2048, 6000])
def test_truncated_tar(tar, size):
    _truncate(tar, size)
    with pytest.raises(ShardError, match="00000.tar"):
        build_index(tar)
    assert not tar.with_suffix(".idx").exists()


def test_garbage_inside_a_tar(tar):
    with open(tar, "r+b") as file:
        file.seek(1024)
        file.write(os.urandom(512))
    with pytest.raises(ShardError, match="truncated or damaged"):
        build_index(tar)


def test_not_a_tar(tmp_path):
    for name, data in (("x.tar", b"<html>not found</html>" * 100), ("y.tar", b"\x1f\x8b" + bytes(2000))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ShardError, match="not a complete, uncompressed tar"):
            ShardSet([tmp_path / name])
    html = b"<html>not found</html>" * 100
    for name, data, remedy in (
        ("z.tar", html, "partial download is the usual reason"),
        ("x.mp4", html, "does not end in .tar.*prepare.py FOLDER --captions FILE"),
        ("x.tar.gz", b"\x1f\x8b" + bytes(2000), "it is compressed: gunzip it first"),
        ("x.tar.zst", b"(\xb5/\xfd" + bytes(2000), "unzstd it first"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ShardError, match=f"{name}: .*{remedy}"):
            ShardSet([tmp_path / name])
    (tmp_path / "frames").mkdir()
    with pytest.raises(ShardError, match=r"frames is a folder: write '.*frames/\*.tar'"):
        ShardSet([tmp_path / "frames"])


def test_empty_tar(tmp_path, write_tar):
    with pytest.raises(ShardError, match="no samples"):
        ShardSet([write_tar(tmp_path / "x.tar", [])])
    with pytest.raises(ShardError, match="no samples"):
        ShardSet([write_tar(tmp_path / "y.tar", [(".hidden", b"x"), ("deep/.hidden.txt", b"x")])])
    with pytest.raises(ShardError, match="at least one"):
        ShardSet([])


def test_links_and_escapes_are_refused(tmp_path, write_tar):
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        member = tarfile.TarInfo("k.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ShardError, match="link, device"):
        ShardSet([tmp_path / "link.tar"])
    for name in ("../k.txt", "/etc/k.txt", "a/../../k.txt"):
        with pytest.raises(ShardError, match="leaves the archive"):
            ShardSet([write_tar(tmp_path / "x.tar", [(name, b"x")])])


def test_index_older_than_its_tar(tar, write_tar):
    index = build_index(tar)
    before = index.stat().st_mtime_ns
    os.utime(tar, ns=(before + 10**9, before + 10**9))
    assert len(ShardSet([tar])) == 3  # copied without their times
    assert index.stat().st_mtime_ns == tar.stat().st_mtime_ns
    write_tar(tar, [(f"{key}.txt", b"other") for key in "abc"])
    later = index.stat().st_mtime_ns + 10**9
    os.utime(tar, ns=(later, later))
    with pytest.raises(ShardError, match=r"(?s)00000.idx is older than its shard .*00000.tar.*delete"):
        ShardSet([tar])


def test_tar_from_the_future(tar):
    os.utime(tar, (4e9, 4e9))
    assert len(ShardSet([tar])) == len(ShardSet([tar])) == 3


def test_index_of_a_shorter_tar(tar):
    index = build_index(tar)
    _truncate(tar, 3000)
    os.utime(index)
    with pytest.raises(ShardError, match=r"names bytes up to 8192, but .*00000.tar has 3000.*delete"):
        ShardSet([tar])


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "first line"),
        ("v1.1 1\ntxt 512 3\n", "first line"),
        ("v1.2 2\ntxt 512 3 k.txt\n", "promises 2"),
        ("v1.2 1\ntxt 512 3\n", "line 2"),
        ("v1.2 1\ntxt x 3 k.txt\n", "invalid literal"),
        ("v1.2 1\ntxt -1 3 k.txt\n", "negative"),
        ("v1.2 1\ntxt 512 3 ../k.txt\n", "no name"),
    ],
)
def test_damaged_index(tar, text, problem):
    tar.with_suffix(".idx").write_text(text)
    with pytest.raises(ShardError, match=rf"(?s)00000.idx.*{problem}.*delete .*it is rebuilt"):
        ShardSet([tar])


def test_index_not_wanted_or_not_writable(tar, monkeypatch, caplog):
    with pytest.raises(ShardError, match="index 00000.idx is missing"):
        ShardSet([tar], missing_index="error")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        assert len(ShardSet([tar])) == 3
    assert caplog.text.count("kept in memory") == 1
    assert [path.name for path in tar.parent.iterdir()] == ["00000.tar"]


def test_white_space_stays_in_memory(tmp_path, write_tar):
    tar = write_tar(tmp_path / "x.tar", [("my clip.txt", b"said")])
    assert ShardSet([tar])[0].captions() == ["said"]
    with pytest.raises(ShardError, match="white space"):
        build_index(tar)


def test_shard_shrinks_while_in_use(tar):
    shards = ShardSet([tar])
    _truncate(tar, 5200)
    with pytest.raises(ShardError, match="1000 bytes by the index"):
        shards[1].read("mp4")


def test_expand_shards(tmp_path):
    for n in range(12):
        (tmp_path / f"{n:02d}.tar").write_bytes(b"")
    names = [path.name for path in expand_shards([f"{tmp_path}/{{03..05}}.tar", f"{tmp_path}/0[45].tar"])]
    assert names == ["03.tar", "04.tar", "05.tar"]
    assert len(expand_shards(f"{tmp_path}/*.tar")) == 12
    with pytest.raises(ShardError, match=r"no shard matches '.*nothing.*launch/prepare.py"):
        expand_shards([f"{tmp_path}/*.tar", f"{tmp_path}/nothing*.tar"])
    with pytest.raises(ShardError, match="shard pattern"):
        expand_shards("{00..01.tar")


def test_json_written_by_preparation_round_trips(tmp_path, write_tar):
    record = {"captions": ["zwei", "ein"], "crc32": [1]}
    tar = write_tar(tmp_path / "x.tar", [("k.json", json.dumps(record).encode())])
    assert json.loads(ShardSet([tar])[0].read("json")) == record
