"""What a shard or its name must not be able to do: refused by name, without a side effect."""

import io

import numpy as np
import pytest
from data import malicious
from PIL import Image

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data import decoding, frame_headers
from miles_fast.data.clips import ClipDraw, read_clip
from miles_fast.data.frame_headers import frame_size
from miles_fast.data.shards import SampleError, ShardError, ShardSet, build_index
from miles_fast.data.sources import open_shards
from miles_fast.data.videos import read_frames

DRAW = ClipDraw(num_frames=1, takes="jpeg")


@pytest.fixture(autouse=True)
def nothing_else_is_written(tmp_path):
    yield
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left <= {"bad.tar", "bad.idx"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", malicious.SHARDS)
def test_malicious_tars_are_refused_by_name(tmp_path, kind):
    build, message = malicious.SHARDS[kind]
    tar = build(tmp_path / "bad.tar")
    for use in (build_index, lambda path: ShardSet([path])):
        with pytest.raises(ShardError, match=rf"(?s)bad\.tar.*({message})"):
            use(tar)
    assert not tar.with_suffix(".idx").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("jpg 512 5000000000 a.jpg", "the limit of its kind"),
        ("jpg 512 100 a.jpg txt 512 5 a.txt", "overlap"),
        ("txt 1536 5 a.txt txt 512 3 a.txt", "'a.txt' twice"),
        ("jpg 512 999999 a.jpg", "names bytes up to"),
        ("jpg 512 100 /etc/a.jpg", "no name"),
        ("jpg 512 100 a.jpg txt 1536 5 ../a.txt", "no name"),
        ("jpg 99999999999999999999999999 1 a.jpg", "names bytes up to"),
    ],
)
def test_malicious_indexes_are_refused_by_name(tmp_path, line, message):
    tar = malicious.good(tmp_path / "bad.tar")
    tar.with_suffix(".idx").write_text(f"v1.2 1\n{line}\n")
    with pytest.raises(ShardError, match=rf"(?s)bad\.idx.*{message}"):
        ShardSet([tar])


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_of_a_gigapixel_is_a_bad_sample(tmp_path, kind, checked):
    shards = ShardSet([malicious.with_huge_image(tmp_path / "bad.tar", kind, checked)])
    with pytest.raises(SampleError, match="bad.tar.*(65535x65535 pixels, the limit|exceeds limit)") as raised:
        read_clip(shards, 0, DRAW, None)
    assert raised.value.cause == "frame too large"


@pytest.mark.parametrize(
    "save", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(9000), "dpi": (7, 7)}]
)
def test_the_size_of_a_picture_is_read_from_its_header(save):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = io.BytesIO()
        Image.new("RGB", (70, 30)).save(data, kind, **save)
        assert frame_size(data.getvalue(), "x") == (70, 30)
    for cut in (data.getvalue()[:9], b"", b"\xff\xd8", b"\xff\xd8" + b"\xff\xff" * 99):
        with pytest.raises(SampleError, match="not a readable image"):
            frame_size(cut, "x")


def test_a_size_cannot_be_hidden_by_a_fill_byte():
    data = malicious.huge_image("jpg")
    at = data.index(b"\xff\xc0")
    hidden = data[:at] + b"\xff" + data[at:]  # FF FF C0 00 is no segment of 0xC000 bytes
    hidden = hidden.ljust(at + 2 + 0xC000, b"\0") + b"\xff\xc0\x00\x11\x08" + b"\x00\x10" * 2 + bytes(9)
    with pytest.raises(SampleError) as raised:
        frame_size(hidden, "x")
    assert raised.value.cause == "frame too large"


def test_a_video_that_grows_is_a_bad_sample(monkeypatch, encode_video):
    # MPEG-TS may change its size on the way: what the header says first is not the whole of it.
    monkeypatch.setattr(decoding, "MAX_FRAME_PIXELS", 64 * 64)
    small, large = (encode_video([9] * 12, container="mpegts", size=size) for size in ((64, 48), (640, 480)))
    assert len(read_frames(small + small, np.arange)[0]) > 12
    with pytest.raises(SampleError, match="does not decode|cannot be decoded"):
        read_frames(small + large, np.arange)
    monkeypatch.setattr(frame_headers, "MAX_FRAME_PIXELS", 64 * 64)
    with pytest.raises(SampleError, match="x: its header says 640x480 pixels") as raised:
        read_frames(large, np.arange, name="x")
    assert raised.value.cause == "frame too large"


def test_no_pickle_is_ever_loaded(tmp_path):
    proof = tmp_path / "proof"
    shards = ShardSet([malicious.with_pickles(tmp_path / "bad.tar", proof)])
    assert "pyd" in shards[0].extensions
    for again in range(2):
        assert read_clip(shards, 0, DRAW, None).caption == "a dog", again
        shards = ShardSet(shards.paths)  # by the index that the first one wrote
    assert not proof.exists()


@pytest.mark.parametrize("allowed", [[], ["https://data.example/sets/"]])
@pytest.mark.parametrize(
    "name, message",
    [
        ("pipe:touch {proof}", "pipe: is refused"),
        ("pipe:cat x.tar; touch {proof}", "pipe: is refused"),
        ("PIPE:touch {proof} #.tar", "pipe: is refused"),
        ("$(touch {proof}).tar", "no shard matches"),
        ("`touch {proof}`.tar", "no shard matches"),
        ("x.tar|touch {proof}", "no shard matches"),
        ("gs://bucket/x.tar", "gs: is refused"),
        ("hdfs://host/x.tar", "hdfs: is refused"),
        ("ftp://host/x.tar", "ftp: is refused"),
        ("data:application/x-tar,x", "data: is refused"),
        ("file://evil/x.tar", "another host"),
        ("https://other.example/sets/x.tar", "no prefix"),
        ("http://data.example/sets/x.tar", "no prefix"),
        ("http://127.0.0.1/x.tar", "no prefix"),
        ("http://localhost/x.tar", "no prefix"),
        ("http://[::1]/x.tar", "no prefix"),
        ("http://169.254.169.254/latest/meta-data/x.tar", "no prefix"),
        ("s3://bucket/x.tar", "no prefix"),
        ("https://data.example@evil.example/sets/x.tar", "user or password"),
        ("https://data.example/sets/../x.tar", "'..'"),
        ("https://data.example/sets/%2e%2e/x.tar", "'..'"),
        ("https://data.example/sets/%252e%252e/x.tar", "'..'"),
    ],
)
def test_names_of_shards_are_refused(tmp_path, monkeypatch, name, message, allowed):
    def nothing(*_, **__):
        raise AssertionError("a refused name reached the network or a shell")

    monkeypatch.setattr("socket.getaddrinfo", nothing)
    monkeypatch.setattr("socket.socket.connect", nothing)
    monkeypatch.setattr("subprocess.Popen.__init__", nothing)
    source = SourceConfig(shards=[name.format(proof=tmp_path / "proof")])
    data = DataConfig(train=[source], allowed_prefixes=allowed, cache_folder=str(tmp_path / "cache"))
    with pytest.raises(ShardError, match=message) as raised:
        open_shards(source, data)
    assert name.split("@")[-1].split("{")[0][:4] in str(raised.value)


@pytest.mark.parametrize("prefix", ["pipe:", "file:///", "https://", "https://a@b/", "https://a/../", "*"])
def test_prefixes_that_allow_too_much_are_refused(tmp_path, prefix):
    source = SourceConfig(shards=["https://data.example/x.tar"])
    data = DataConfig(train=[source], allowed_prefixes=[prefix])
    with pytest.raises(ShardError, match="data.allowed_prefixes: "):
        open_shards(source, data)
