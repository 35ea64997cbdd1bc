"""Preparation of tars that lie elsewhere, here on a server on this machine; those on s3 are in test_s3.py."""

from __future__ import annotations

import hashlib
import logging
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from data.serving import serving

from miles_fast.data import downloads
from miles_fast.data.fetching import fetched
from miles_fast.data.http_files import _connect
from miles_fast.data.locations import access_to, check_redirect
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.shards import ShardError, ShardSet

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


@pytest.fixture
def server(tmp_path, tars, monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_WAIT_SECONDS", 0.01)
    with serving(tmp_path / "far") as server:
        yield server


def shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("0*"))}


def test_tars_over_http_become_the_shards_that_local_ones_do(server, tars, tmp_path):
    summary = prepare([f"{server.url}/{{00000..00002}}.tar?signature=secret"], tmp_path / "out", OPTIONS)
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
    server.asked.clear()
    (tmp_path / "out/00001.tar").unlink()
    again = prepare([f"{server.url}/{{00000..00002}}.tar?signature=other"], tmp_path / "out", OPTIONS)
    assert server.asked == {("HEAD", "/00001.tar"): 1, ("GET", "/00001.tar"): 1} and again.kept == 6


def test_a_broken_connection_is_tried_again(server, tmp_path, caplog):
    server.faults["/00001.tar"] = ["cut"]
    with caplog.at_level(logging.WARNING):
        assert prepare([f"{server.url}/{{00000..00002}}.tar"], tmp_path / "out", OPTIONS).kept == 6
    assert "00001.tar: attempt 1 failed" in caplog.text


def test_what_is_not_there_is_named(server, tmp_path, tars):
    with pytest.raises(
        PreparationError, match=r"/00007\.tar: the server answers 404.*correct the URL.*same command again"
    ):
        prepare([f"{server.url}/{{00002,00007}}.tar"], tmp_path / "out", OPTIONS)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    (tmp_path / "far/cut.tar").write_bytes(tars[0].read_bytes()[:2000])
    with pytest.raises(PreparationError, match=r"127.0.0.1:\d+/cut.tar: .*truncated|not a complete"):
        prepare([f"{server.url}/cut.tar"], tmp_path / "cut", OPTIONS)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            PreparationError,
            match="6 attempts failed.*ConnectionRefused.*not used.; finished.*same command again",
        ):
            prepare([f"{address}/x.tar"], tmp_path / "none", OPTIONS)


def test_remote_captions(server, tmp_path, encode_video):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(encode_video([9] * 9))
    (tmp_path / "far/c.csv").write_text("file,caption\na.mp4,said\n")
    summary = prepare([tmp_path / "clips"], tmp_path / "out", OPTIONS, f"{server.url}/c.csv")
    assert ShardSet(summary.shards)[0].captions() == ["said"]


def test_file_addresses_are_paths(tars, tmp_path):
    assert prepare([f"file://{tmp_path}/far/0000%30.tar"], tmp_path / "out", OPTIONS).kept == 2
    with pytest.raises(ShardError, match=r"file: of another host \(host\)"):
        prepare(["file://host/x.tar"], tmp_path / "none", OPTIONS)


def test_addresses(tmp_path):
    for name, problem in (
        ("gopher://x/a.tar", "gopher: is refused"),
        ("http://x/*.tar", "only s3 can be searched"),
        ("http://x/{a.tar", "write"),
        ("https://me:pw@x/a.tar", "https://x/a.tar: a user or password"),
    ):
        with pytest.raises(ValueError, match=problem) as raised:
            prepare([name], tmp_path / "out", OPTIONS)
        assert "pw" not in str(raised.value)
    with pytest.raises(PreparationError, match="addresses of tars alone"):
        prepare(["http://x/a.tar", "b.tar"], tmp_path / "out", OPTIONS)
    with pytest.raises(PreparationError, match="limit counts clips"):
        prepare(["http://x/a.tar"], tmp_path / "out", PreparationOptions(limit=3))


def test_what_a_typed_url_may_lead_to(server, tmp_path):
    """Redirects: to its own host, and to https of the open internet; nothing else is connected to."""
    own = f"{server.url}/00000.tar"
    for target, problem in (
        (f"http://localhost:{server.port}/00001.tar", "only https: is followed"),
        ("http://93.184.216.34/x.tar", "only https: is followed"),
        (f"https://127.0.0.1:{server.port + 1}/x.tar", "127.0.0.1, a loopback address"),
        ("https://169.254.169.254/latest/meta-data/", "a link-local address"),
        ("https://10.0.0.1/x.tar", "a private address"),
        ("https://[::ffff:127.0.0.1]/x.tar", "a loopback address"),
        ("s3://bucket/x.tar", "only https: is followed"),
        ("file:///etc/passwd", "expected one of"),
    ):
        server.faults["/00000.tar"] = server.faults["HEAD", "/00000.tar"] = [target] * 3
        with pytest.raises(PreparationError, match=problem), fetched(own, tmp_path):
            pass
    server.faults["/00000.tar"] = [f"{server.url}/00001.tar"]
    server.faults["HEAD", "/00000.tar"] = [f"{server.url}/00001.tar"]
    with fetched(own, tmp_path) as path:
        assert path.name == "00000.tar"
        assert path.read_bytes() == (tmp_path / "far/00001.tar").read_bytes()


def test_a_typed_url_may_lead_to_another_host(monkeypatch):
    """Each hop is resolved and checked anew: a public address is connected to, one inside is not."""
    addresses = {"hub.example": "10.1.2.3", "cdn.example": "93.184.216.34", "inside.example": "10.1.2.3"}
    connected = []

    def resolve(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], port))]

    def connect(_, address):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    access = access_to("https://hub.example/a/x.tar?signature=1")
    for url in ("https://hub.example/b/y.tar", "https://cdn.example/x.tar?key=2"):
        _, may = check_redirect(url, access)
        with pytest.raises(ConnectionRefusedError):
            _connect(url, urlsplit(url).hostname, 443, may)
    assert connected == [("10.1.2.3", 443), ("93.184.216.34", 443)]
    _, may = check_redirect("https://inside.example/x.tar", access)
    with pytest.raises(ShardError, match=r"inside.example is at 10.1.2.3, a private address"):
        _connect("https://inside.example/x.tar", "inside.example", 443, may)
    for address in ("127.0.0.1", "169.254.169.254"):
        addresses["hub.example"] = address
        with pytest.raises(ShardError, match=f"hub.example is at {address}.*write http://{address}/"):
            _connect("https://hub.example/a/x.tar", "hub.example", 443, access)
    assert len(connected) == 2
