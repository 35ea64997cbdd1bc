"""Reading of remote files: every attempt that fails for a reason that may pass is repeated, then named."""

from __future__ import annotations

import http.client
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from miles_fast.data.http_files import describe_http, described, http_pieces, respond
from miles_fast.data.locations import Access, shown
from miles_fast.data.remote_file import RemoteFile
from miles_fast.data.s3_files import describe_s3, matches_s3, pieces_s3
from miles_fast.data.shard_index import ShardError

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0

Result = TypeVar("Result")


class Stopped(Exception):
    """A download was given up because nobody wants it any more."""


def describe(url: str, access: Access) -> RemoteFile:
    """Size and version of a file. Raises MissingError, or ShardError when all attempts fail."""
    return _retry(
        url, access, lambda: describe_s3(url, access) if _is_s3(url) else describe_http(url, access)
    )


def read_small(url: str, access: Access, limit: int) -> bytes:
    """The bytes of a file. Raises as `describe`, and ShardError for more than `limit` bytes."""

    def attempt() -> bytes:
        if _is_s3(url):
            return b"".join(pieces_s3(_fitting(describe_s3(url, access), limit), access))
        with respond(url, "GET", access) as response:
            file = _fitting(described(url, response), limit)
            return b"".join(http_pieces(file, response, access))

    return _retry(url, access, attempt)


def matching(pattern: str, access: Access) -> list[str]:
    """URLs that a pattern on s3 matches. Raises as `describe`."""
    return _retry(pattern, access, lambda: matches_s3(pattern, access))


def download(file: RemoteFile, out: BinaryIO, access: Access, stop: threading.Event | None = None) -> None:
    """Write a file's bytes from the start of `out`, which must be the version described.

    Raises MissingError or ShardError, and Stopped once `stop` is set.
    """

    def attempt() -> None:
        if _is_s3(file.url):
            _check_version(file, describe_s3(file.url, access))
            _write(file, pieces_s3(file, access), out, stop)
            _check_version(file, describe_s3(file.url, access))
            return
        with respond(file.url, "GET", access) as response:
            _check_version(file, described(file.url, response))
            _write(file, http_pieces(file, response, access), out, stop)

    _retry(file.url, access, attempt, stop)


def _is_s3(url: str) -> bool:
    return url.lower().startswith("s3:")


def _retry(
    url: str, access: Access, attempt: Callable[[], Result], stop: threading.Event | None = None
) -> Result:
    last: Exception | None = None
    for number in range(access.attempts):
        if number:
            wait = min(FIRST_WAIT_SECONDS * 2 ** (number - 1), LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1)
            logger.warning("%s: attempt %d failed (%s), the next in %.1f s", shown(url), number, last, wait)
            if stop is None:
                time.sleep(wait)
            elif stop.wait(wait):
                raise Stopped
        try:
            return attempt()
        except ssl.SSLCertVerificationError as error:
            raise ShardError(
                f"{shown(url)}: the server's certificate is not trusted ({error.verify_message}); correct "
                "the host, or name its authority with SSL_CERT_FILE"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            last = error
    more = ", or raise data.download_attempts and data.download_timeout_seconds"
    raise ShardError(
        f"{shown(url)}: {access.attempts} attempts failed, the last with {type(last).__name__}: {last}; "
        f"check the server and the network (proxies are not used){'' if access.typed else more}"
    ) from last


def _fitting(file: RemoteFile, limit: int) -> RemoteFile:
    if file.size > limit:
        raise ShardError(f"{file}: {file.size} bytes, the limit is {limit}; is it what it should be?")
    return file


def _check_version(expected: RemoteFile, found: RemoteFile) -> None:
    if (found.size, found.version) != (expected.size, expected.version):
        raise ShardError(
            f"{expected}: changed on the server since the run began (then {expected.size} bytes, version "
            f"{expected.version!r}, now {found.size}, {found.version!r}); start again, from a set that stays"
        )


def _write(file: RemoteFile, pieces: Iterator[bytes], out: BinaryIO, stop: threading.Event | None) -> None:
    out.seek(0)
    for piece in pieces:
        if stop is not None and stop.is_set():
            raise Stopped
        try:
            out.write(piece)
        except OSError as error:
            raise ShardError(
                f"{file}: cannot be written ({error.strerror}); make room, or lower data.cache_gib, or name "
                "another data.cache_folder"
            ) from error
