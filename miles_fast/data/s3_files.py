"""Objects of S3 and of what speaks its protocol, by s3fs: described and read, one attempt each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from miles_fast.data.locations import Access, check_url
from miles_fast.data.remote_file import MissingError, RemoteFile
from miles_fast.data.shard_index import ShardError

_S3_PIECE = 16 << 20


def _s3(access: Access) -> Any:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise ShardError(f"s3: shards need s3fs ({error}): pip install 'miles-fast[remote]'") from error
    config = {
        "connect_timeout": access.timeout_seconds,
        "read_timeout": access.timeout_seconds,
        "retries": {"max_attempts": 0},
    }
    store = S3FileSystem(endpoint_url=access.s3_endpoint, config_kwargs=config, use_listings_cache=False)
    store.retries = 1  # retried here, with what failed in the log
    return store


@contextlib.contextmanager
def _s3_errors(url: str) -> Iterator[None]:
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError, NoCredentialsError

    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise MissingError(
            f"{url}: S3 answers {error}; correct the URL, the rights, or the endpoint (AWS_ENDPOINT_URL or "
            "data.s3_endpoint)"
        ) from error
    except NoCredentialsError as error:
        raise ShardError(
            f"{url}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except (BotoCoreError, ClientError) as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def describe_s3(url: str, access: Access) -> RemoteFile:
    """Size and ETag of an object. Raises MissingError, ShardError, and OSError for what may pass."""
    check_url(url, access)
    store = _s3(access)
    with _s3_errors(url):
        found = store.info(url, refresh=True)
    if found["type"] != "file":
        raise MissingError(f"{url}: is a folder, not a shard")
    return RemoteFile(url=url, size=int(found["size"]), version=str(found.get("ETag", "")))


def matches_s3(pattern: str, access: Access) -> list[str]:
    """URLs of the objects that a pattern with * or [] matches. Raises as `describe_s3`."""
    check_url(pattern, access)
    store = _s3(access)
    with _s3_errors(pattern):
        return [f"s3://{name}" for name in store.glob(pattern)]


def pieces_s3(file: RemoteFile, access: Access) -> Iterator[bytes]:
    """The bytes of an object. Raises as `describe_s3`."""
    store = _s3(access)
    for start in range(0, file.size, _S3_PIECE):
        end = min(start + _S3_PIECE, file.size)
        with _s3_errors(file.url):
            piece = store.cat_file(file.url, start=start, end=end)
        if len(piece) != end - start:
            raise ConnectionError(f"{len(piece)} bytes came of {end - start}")
        yield piece
