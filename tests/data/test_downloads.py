"""Downloads: faults that pass are tried again, those that stay are named, and every hop is checked."""

import io
import shutil
import socket
import ssl
import subprocess
import sys
import threading

import pytest
from data.serving import serving

from miles_fast.data import downloads
from miles_fast.data.downloads import Stopped, describe, download, read_small
from miles_fast.data.locations import Access
from miles_fast.data.remote_file import MissingError
from miles_fast.data.shards import ShardError

BODY = bytes(range(256)) * 5000


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "x.tar").write_bytes(BODY)
    with serving(tmp_path) as server:
        yield server


def access(server, **options):
    return Access(prefixes=(server.url + "/",), **{"attempts": 3, "timeout_seconds": 0.3, **options})


def fetched(server, path="/x.tar", **options):
    may, out = access(server, **options), io.BytesIO()
    download(describe(server.url + path, may), out, may)
    return out.getvalue()


def test_a_file_comes_whole(server):
    file = describe(server.url + "/x.tar", access(server))
    assert file.size == len(BODY) and file.version
    assert fetched(server) == BODY == read_small(server.url + "/x.tar", access(server), len(BODY))
    with pytest.raises(ShardError, match=r"x\.tar: 1280000 bytes, the limit is 10"):
        read_small(server.url + "/x.tar", access(server), 10)


@pytest.mark.parametrize("fault", [503, 429, 500, "cut", "stall", "trickle"])
def test_what_passes_is_tried_again(server, fault, caplog):
    server.faults["/x.tar"] = [fault, fault]
    assert fetched(server) == BODY
    assert server.gets() == 3
    assert "x.tar: attempt 1 failed" in caplog.text and "attempt 2 failed" in caplog.text


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "fault, reason",
    [
        (503, "the server answers 503"),
        ("cut", "the body ends 640000 bytes early"),
        ("stall", "timed out"),
        ("trickle", "bytes in 0 seconds"),
    ],
)
def test_what_stays_is_named(server, fault, reason):
    server.faults["/x.tar"] = [fault] * 9
    with pytest.raises(ShardError, match=rf"/x\.tar: 3 attempts failed.*{reason}.*data.download_attempts"):
        fetched(server)
    assert server.gets() == 3


@pytest.mark.parametrize(
    "fault, message",
    [
        (400, "answers 400 .*expected 200"),
        ("longer", "changed on the server"),
        ("shorter", "changed on the server"),
        ("chunked", "no Content-Length"),
        ("gzip", "in gzip"),
    ],
)
def test_what_is_wrong_is_not_tried_again(server, fault, message):
    server.faults["/x.tar"] = [fault] * 9
    with pytest.raises(ShardError, match=rf"/x\.tar: .*{message}"):
        fetched(server)
    assert server.gets() == 1


@pytest.mark.parametrize("status", [403, 404, 410])
def test_missing_files_are_named(server, status):
    server.faults["/x.tar"] = [status]
    server.faults["HEAD", "/x.tar"] = [status]
    with pytest.raises(MissingError, match=rf"/x\.tar: the server answers {status}.*correct the URL"):
        describe(server.url + "/x.tar", access(server))


def test_a_server_without_head(server):
    server.faults["HEAD", "/x.tar"] = [405]
    assert describe(server.url + "/x.tar", access(server)).size == len(BODY)


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ShardError, match=rf"{url}/x.tar: 1 attempts failed.*ConnectionRefused"):
        describe(url + "/x.tar", Access(prefixes=(url,), attempts=1))


def test_a_signature_is_not_shown(server):
    with pytest.raises(ShardError, match=r"/y\.tar\?\.\.\.: ") as raised:
        describe(server.url + "/y.tar?signature=secret", access(server))
    assert "secret" not in str(raised.value)


def test_a_download_can_be_stopped(server):
    stop = threading.Event()
    stop.set()
    may, out = access(server), io.BytesIO()
    with pytest.raises(Stopped):
        download(describe(server.url + "/x.tar", may), out, may, stop)


def test_redirects_are_followed_where_they_are_allowed(server, tmp_path):
    server.faults["/y.tar"] = [f"{server.url}/z.tar"]
    server.faults["/z.tar"] = [f"{server.url}/x.tar"]
    assert read_small(server.url + "/y.tar", access(server), len(BODY)) == BODY


@pytest.mark.parametrize(
    "target, message",
    [
        ("http://169.254.169.254/latest/meta-data/", "no prefix"),
        ("http://localhost:{port}/x.tar", "no prefix"),
        ("http://[::1]:{port}/x.tar", "no prefix"),
        ("file:///etc/passwd", "expected one of"),
        ("http://127.0.0.1:{port}@evil.example/x.tar", "user or password"),
        ("http://127.0.0.1:{port}/%2e%2e/x.tar", "'..'"),
        ("s3://bucket/x.tar", "no prefix"),
    ],
)
def test_redirects_elsewhere_are_refused(server, target, message, monkeypatch):
    connected = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, a: (connected.append(a), connect(s, a))[1])
    server.faults["/x.tar"] = [target.format(port=server.port)] * 9
    with pytest.raises(ShardError, match=rf"/x\.tar redirects to .*{message}"):
        read_small(server.url + "/x.tar", access(server), 1 << 30)
    assert connected == [("127.0.0.1", server.port)]


def test_a_circle_of_redirects_ends(server):
    server.faults["/x.tar"] = [f"{server.url}/x.tar"] * 99
    with pytest.raises(ShardError, match="more than 5 redirects"):
        read_small(server.url + "/x.tar", access(server), 1 << 30)
    assert server.gets() == 6


@pytest.mark.parametrize("address", ["169.254.169.254", "127.0.0.1", "10.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_an_allowed_name_that_leads_inside_is_refused(monkeypatch, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def resolve(host, port, **_):
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(*_):
        raise AssertionError("nothing may be connected to")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    may = Access(prefixes=("https://shards.example/",), attempts=2)
    with pytest.raises(ShardError, match=rf"https://shards.example/x.tar: shards.example is at {address}"):
        describe("https://shards.example/x.tar", may)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0"])
def test_other_spellings_of_an_address_are_refused(host):
    with pytest.raises(ShardError, match="loopback|unspecified"):
        describe(f"http://{host}/x.tar", Access(prefixes=(f"http://{host}/",), attempts=1))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https_needs_a_certificate_for_the_name(tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.tar").write_bytes(BODY)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost".split()
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(tmp_path / "web", tls) as server:
        by_address = f"https://127.0.0.1:{server.port}"
        may = Access(prefixes=(server.url, by_address), attempts=2, timeout_seconds=5)
        with pytest.raises(ShardError, match="localhost.*certificate is not trusted.*SSL_CERT_FILE"):
            describe(server.url + "/x.tar", may)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert read_small(server.url + "/x.tar", may, len(BODY)) == BODY
        with pytest.raises(ShardError, match="127.0.0.1.*certificate is not trusted"):
            describe(by_address + "/x.tar", may)


def test_a_missing_s3fs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ShardError, match=r"s3fs.*pip install 'miles-fast\[remote\]'"):
        describe("s3://bucket/x.tar", Access(prefixes=("s3://bucket/",)))
