"""Preparation of tars that lie elsewhere: a server on this machine, and s3 as moto plays it."""

from __future__ import annotations

import hashlib
import http.server
import logging
import socket
import subprocess
import sys
import threading
import urllib.parse
from functools import partial
from pathlib import Path

import pytest

from miles_fast.data import fetching
from miles_fast.data.fetching import is_remote, local_name, shown
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.shards import ShardSet

OPTIONS = PreparationOptions(workers=1, frames=2, short_side=32)


@pytest.fixture
def tars(tmp_path, write_tar, encode_video) -> list[Path]:
    (tmp_path / "far").mkdir()
    video = encode_video([10 + 20 * n for n in range(12)])
    return [
        write_tar(
            tmp_path / f"far/{tar:05d}.tar",
            [m for s in range(2) for m in ((f"{tar}{s}.mp4", video), (f"{tar}{s}.txt", b"said"))],
        )
        for tar in range(3)
    ]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; the first answer to each name in `breaks` ends half-way; all names are noted."""

    asked: list[str] = []
    breaks: set[str] = set()

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = urllib.parse.urlsplit(self.path).path.lstrip("/")
        self.asked.append(name)
        if name in self.breaks:
            self.breaks.discard(name)
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        super().do_GET()


@pytest.fixture
def server(tmp_path, tars, monkeypatch):
    pytest.importorskip("aiohttp", reason="aiohttp, which reads http, is not installed (miles-fast[remote])")
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Handler, "breaks", set())
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "far"))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("0*"))}


def test_tars_over_http_become_the_shards_that_local_ones_do(server, tars, tmp_path):
    summary = prepare([f"{server}/{{00000..00002}}.tar?signature=secret"], tmp_path / "out", OPTIONS)
    assert (summary.kept, len(summary.shards)) == (6, 3)
    prepare(
        tars,
        tmp_path / "local",
        PreparationOptions(**{**OPTIONS.planned(), "samples_per_shard": 2, "workers": 1}),
    )
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
    assert ShardSet(summary.shards)[4].record()["source"]["shard"] == "00002.tar"
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] == ".") == [".records"]
    told = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"secret" not in told
    Handler.asked.clear()
    (tmp_path / "out/00001.tar").unlink()
    again = prepare([f"{server}/{{00000..00002}}.tar?signature=other"], tmp_path / "out", OPTIONS)
    assert set(Handler.asked) == {"00001.tar"} and again.kept == 6


def test_a_broken_connection_is_tried_again(server, tmp_path, caplog):
    Handler.breaks |= {"00001.tar"}
    with caplog.at_level(logging.WARNING):
        assert prepare([f"{server}/{{00000..00002}}.tar"], tmp_path / "out", OPTIONS).kept == 6
    assert "00001.tar: try 1 of 4 failed" in caplog.text


def test_what_is_not_there_is_named(server, tmp_path, tars):
    with pytest.raises(PreparationError, match=r"/00007\.tar: is not there.*correct the address"):
        prepare([f"{server}/{{00002,00007}}.tar"], tmp_path / "out", OPTIONS)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    (tmp_path / "far/cut.tar").write_bytes(tars[0].read_bytes()[:2000])
    with pytest.raises(PreparationError, match=r"127.0.0.1:\d+/cut.tar: .*truncated|not a complete"):
        prepare([f"{server}/cut.tar"], tmp_path / "cut", OPTIONS)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(PreparationError, match="could not be fetched in 4 tries.*same command again"):
            prepare([f"{address}/x.tar"], tmp_path / "none", OPTIONS)


def test_remote_captions(server, tmp_path, encode_video):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(encode_video([9] * 9))
    (tmp_path / "far/c.csv").write_text("file,caption\na.mp4,said\n")
    summary = prepare([tmp_path / "clips"], tmp_path / "out", OPTIONS, f"{server}/c.csv")
    assert ShardSet(summary.shards)[0].captions() == ["said"]


def test_file_addresses_are_paths(tars, tmp_path):
    assert prepare([f"file://{tmp_path}/far/0000%30.tar"], tmp_path / "out", OPTIONS).kept == 2
    with pytest.raises(PreparationError, match="names the machine host"):
        local_name("file://host/x.tar")


def test_addresses(tmp_path):
    assert is_remote("https://x/a.tar") and is_remote("s3://b/a.tar") and not is_remote("a/b:c.tar")
    assert shown("https://me:pw@x.org/a.tar?key=1") == "https://x.org/a.tar"
    for name, problem in (
        ("gopher://x/a.tar", "not from gopher"),
        ("http://x/*.tar", "only s3 can be searched"),
        ("http://x/{a.tar", "write"),
    ):
        with pytest.raises(PreparationError, match=problem):
            prepare([name], tmp_path / "out", OPTIONS)
    with pytest.raises(PreparationError, match="addresses of tars alone"):
        prepare(["http://x/a.tar", "b.tar"], tmp_path / "out", OPTIONS)
    with pytest.raises(PreparationError, match="limit counts clips"):
        prepare(["http://x/a.tar"], tmp_path / "out", PreparationOptions(limit=3))


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    import fsspec

    def lacking(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", lacking)
    with pytest.raises(
        PreparationError, match=r"b/a.tar: .*Install s3fs.*pip install 'miles-fast\[remote\]'"
    ):
        prepare(["s3://b/a.tar"], tmp_path / "out", OPTIONS)


def test_s3(tars, tmp_path, monkeypatch):
    for package in ("s3fs", "moto.server"):
        pytest.importorskip(package, reason=f"{package} is not installed: s3 is not tested")
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        for _ in range(100):
            with socket.socket() as trying:
                if trying.connect_ex(("127.0.0.1", port)) == 0:
                    break
                threading.Event().wait(0.1)
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        for tar in tars:
            system.put_file(str(tar), f"bucket/{tar.name}")
        assert prepare(["s3://bucket/0*.tar"], tmp_path / "out", OPTIONS).kept == 6
        with pytest.raises(PreparationError, match="s3://bucket/9.tar: is not there"):
            prepare(["s3://bucket/9.tar"], tmp_path / "none", OPTIONS)
        with pytest.raises(PreparationError, match="matches nothing"):
            prepare(["s3://bucket/9*.tar"], tmp_path / "none", OPTIONS)
    finally:
        process.terminate()
        process.wait()
