"""Files of web servers, by the standard library: described and read, one attempt each.

http.client instead of fsspec's aiohttp: it lets us choose the address that is connected to, so that what was
checked is what is talked to, and follow redirects by hand. Proxies of the environment are not used: behind
one nobody could tell which address is reached.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

from miles_fast.data.locations import Access, Location, check_addresses, check_redirect, check_url, shown
from miles_fast.data.remote_file import MissingError, RemoteFile
from miles_fast.data.shard_index import ShardError

MAX_REDIRECTS = 5
MIN_BYTES_PER_SECOND = 1024
_PIECE = 1 << 20
_MISSING = (403, 404, 410)  # S3 answers 403 for what is not there to those who may not list the bucket
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def _connect(url: str, host: str, port: int, access: Access) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise ShardError(f"{shown(url)}: {host!r} is no host name ({error})") from error
    check_addresses(url, host, [str(address[0]) for *_, address in found], access)
    last: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(access.timeout_seconds)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            connection.close()
            last = error
    raise last or ConnectionError(f"{host} has no address")


class _Plain(http.client.HTTPConnection):
    """A connection to an address that was checked."""

    auto_open = 0

    def open_to(self, url: str, access: Access) -> None:
        self.sock = _connect(url, self.host, self.port, access)


class _Encrypted(_Plain):
    """The same, encrypted for the name that the address was found by."""

    default_port = http.client.HTTPS_PORT

    def open_to(self, url: str, access: Access) -> None:
        super().open_to(url, access)
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


@contextlib.contextmanager
def respond(url: str, method: str, access: Access) -> Iterator[http.client.HTTPResponse]:
    """The server's answer with the file, after at most 5 redirects, each checked as the URL itself was."""
    here = url
    for _ in range(MAX_REDIRECTS + 1):
        place, may = _check_hop(url, here, access)
        kind = _Encrypted if place.scheme == "https" else _Plain
        connection = kind(place.host, place.port, timeout=access.timeout_seconds)
        try:
            connection.open_to(here, may)
            parts = urlsplit(here)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept-Encoding": "identity", "User-Agent": "miles-fast"}
            connection.request(method, target, headers=headers)
            response = connection.getresponse()
            if response.status not in (301, 302, 303, 307, 308):
                _check_status(url, response)
                yield response
                return
            here = urljoin(here, response.headers.get("Location", ""))
        finally:
            connection.close()
    raise ShardError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects; name the file's own URL")


def _check_hop(url: str, here: str, access: Access) -> tuple[Location, Access]:
    if here == url:
        return check_url(url, access), access
    try:
        place, may = check_redirect(here, access)
    except ShardError as error:
        raise ShardError(f"{shown(url)} redirects to {error}") from error
    if place.scheme == "s3":
        raise ShardError(f"{shown(url)} redirects to {shown(here)}; name that one as the shard")
    return place, may


def _check_status(url: str, response: http.client.HTTPResponse) -> None:
    status = f"{response.status} {response.reason}"
    if response.status in _TRANSIENT:
        raise ConnectionError(f"the server answers {status}")
    if response.status in _MISSING:
        raise MissingError(
            f"{shown(url)}: the server answers {status}; correct the URL, or give access to it"
        )
    if response.status != 200:
        raise ShardError(f"{shown(url)}: the server answers {status}, expected 200; correct the URL")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ShardError(f"{shown(url)}: the server sends it in {encoding}; have it send the file as it is")


def described(url: str, response: http.client.HTTPResponse) -> RemoteFile:
    """The file that an answer is about. Raises ShardError where the answer has no length."""
    length, headers = response.headers.get("Content-Length", ""), response.headers
    if not (length.isascii() and length.isdigit()):
        raise ShardError(f"{shown(url)}: the server gives no Content-Length, without which a cut is not seen")
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return RemoteFile(url=url, size=int(length), version=version)


def describe_http(url: str, access: Access) -> RemoteFile:
    """Size and version of a file. Raises MissingError, ShardError, and OSError for what may pass."""
    try:
        with respond(url, "HEAD", access) as response:
            return described(url, response)
    except ShardError:
        # Signed URLs and some servers allow GET alone; of its answer the head is read only.
        with respond(url, "GET", access) as response:
            return described(url, response)


def http_pieces(file: RemoteFile, response: http.client.HTTPResponse, access: Access) -> Iterator[bytes]:
    """The body of an answer. Raises OSError when it ends early or hardly moves."""
    left, mark, since = file.size, 0, time.monotonic()
    while left:
        piece = response.read1(min(_PIECE, left))
        if not piece:
            raise ConnectionError(f"the body ends {left} bytes early")
        left, mark = left - len(piece), mark + len(piece)
        seconds = time.monotonic() - since
        if seconds > access.timeout_seconds:
            if mark < MIN_BYTES_PER_SECOND * seconds:
                raise TimeoutError(f"{mark} bytes in {seconds:.0f} seconds")
            mark, since = 0, time.monotonic()
        yield piece
