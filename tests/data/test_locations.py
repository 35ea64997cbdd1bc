"""Names of shards: what is a path, what is a URL, and which URLs and addresses are allowed."""

import pytest

from miles_fast.data.locations import Access, check_addresses, check_url, expand_shards, local_path
from miles_fast.data.shards import ShardError

ACCESS = Access(
    prefixes=(
        "https://data.example/sets/a",
        "https://data.example:8443/",
        "s3://bucket/frames/",
        "http://[::1]:80/",
    )
)


@pytest.mark.parametrize(
    "name, path",
    [
        ("a/b-*.tar", "a/b-*.tar"),
        ("/a/b.tar", "/a/b.tar"),
        ("file:a b.tar", "a b.tar"),
        ("file:///a%20b.tar", "/a b.tar"),
        ("file://localhost/b.tar", "/b.tar"),
        ("FILE:b.tar", "b.tar"),
        ("./a:b.tar", "./a:b.tar"),
        ("https://data.example/x.tar", None),
        ("S3://bucket/x.tar", None),
    ],
)
def test_paths_and_urls(name, path):
    assert local_path(name) == path


@pytest.mark.parametrize(
    "name",
    [
        "pipe:cat x.tar",
        "PIPE:touch proof",
        "gs://b/x.tar",
        "data:,x",
        "hdfs://x/y",
        "ftp://x/y.tar",
        "a:b.tar",
    ],
)
def test_other_schemes_are_refused(name):
    with pytest.raises(ShardError, match=rf"{name.split(':')[0]}.*refused"):
        local_path(name)
    with pytest.raises(ShardError, match="another host"):
        local_path("file://evil/x.tar")


@pytest.mark.parametrize(
    "url",
    [
        "https://data.example/sets/a/x.tar",
        "https://data.example:443/sets/a/deep/x.tar?signature=1",
        "https://DATA.example/sets/a/x%20y.tar",
        "https://data.example:8443/x.tar",
        "s3://bucket/frames/x.tar",
        "http://[::1]/x.tar",
    ],
)
def test_allowed(url):
    assert check_url(url, ACCESS).segments[-1].endswith(".tar")


@pytest.mark.parametrize(
    "url, message",
    [
        ("https://data.example/sets/ab/x.tar", "no prefix"),
        ("https://data.example/x.tar", "no prefix"),
        ("http://data.example/sets/a/x.tar", "no prefix"),
        ("https://data.example:444/sets/a/x.tar", "no prefix"),
        ("https://data.example.evil/sets/a/x.tar", "no prefix"),
        ("https://data.example./sets/a/x.tar", "no prefix"),
        ("https://evil/https://data.example/sets/a/x.tar", "no prefix"),
        ("s3://bucket2/frames/x.tar", "no prefix"),
        ("s3://bucket/x.tar", "no prefix"),
        ("s3://Bucket/frames/x.tar", "no prefix"),
        ("https://data.example@evil/sets/a/x.tar", "user or password"),
        ("https://user:secret@data.example/sets/a/x.tar", "user or password"),
        ("https://data.example/sets/a/../b/x.tar", "'..'"),
        ("https://data.example/sets/a/%2e%2e/b/x.tar", "'..'"),
        ("https://data.example/sets/a/%2E./b/x.tar", "'..'"),
        ("https://data.example/sets/a/%252e%252e/b/x.tar", "'..'"),
        ("https://data.example/sets/a/..%2fb/x.tar", "'..'"),
        ("https://data.example/sets/a%5c..%5cb/x.tar", "'..'"),
        ("https://data.example/sets/a/%2525252525252e./x.tar", "several times over"),
        ("https://data.example\\@evil/sets/a/x.tar", "backslashes"),
        ("https://data.example/sets/a/x.tar\r\nHost: evil", "control characters"),
        ("https://dаta.example/sets/a/x.tar", "non-ASCII"),
        ("https:///sets/a/x.tar", "no host"),
        ("https:data.example/x.tar", "no host"),
        ("https://data.example:x/sets/a/x.tar", "not a URL"),
        ("https://[::1/x.tar", "not a URL"),
        ("https://data.example/sets/a/x.tar#y", "fragment"),
    ],
)
def test_refused(url, message):
    with pytest.raises(ShardError, match=message) as raised:
        check_url(url, ACCESS)
    assert "secret" not in str(raised.value)
    with pytest.raises(ShardError, match="it is empty|" + message):
        check_url(url, Access())


def test_prefixes_are_checked_when_they_are_read():
    for prefix in ("https://", "pipe:cat", "data.example", "https://a/../b", "*"):
        with pytest.raises(ShardError):
            Access(prefixes=(prefix,))


@pytest.mark.parametrize(
    "address, kind",
    [
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("::127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("2002:a9fe:a9fe::", "link-local"),
        ("fe80::1%2", "link-local"),
        ("10.1.2.3", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00:ec2::254", "private"),
        ("224.0.0.1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
    ],
)
def test_addresses_of_this_network_must_be_listed_themselves(address, kind):
    url, named = "http://shards.example/x.tar", Access(prefixes=("http://shards.example/",))
    with pytest.raises(ShardError, match=rf"shards.example is at .*{kind}.*list the address as well"):
        check_addresses(url, "shards.example", ["93.184.216.34", address], named)
    check_addresses(url, "shards.example", ["93.184.216.34", "2606:2800:220:1::1"], named)
    if "%" not in address:
        host = f"[{address}]" if ":" in address else address
        listed = Access(prefixes=("http://shards.example/", f"http://{host}/"))
        check_addresses(url, "shards.example", [address], listed)


def test_localhost_lists_loopback_only():
    access = Access(prefixes=("http://localhost:8000/", "http://other/"))
    check_addresses("http://localhost:8000/x", "localhost", ["127.0.0.1", "::1"], access)
    for host, address in (("localhost", "10.0.0.1"), ("other", "127.0.0.1")):
        with pytest.raises(ShardError, match=address):
            check_addresses("http://x/", host, [address], access)


def test_patterns_of_urls_expand_braces_only(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    url = "https://data.example/sets/a"
    found = expand_shards([f"{url}/{{0..2}}.tar", f"{url}/1.tar", f"file:{tmp_path}/*.tar"], ACCESS)
    assert found == [tmp_path / "x.tar", *(f"{url}/{n}.tar" for n in range(3))]
    for wrong, message in (
        (f"{url}/*.tar", "not listed"),
        (f"{url}/x.zip", "ends in .tar"),
        ("https://data.example/sets/{a,b}/x.tar", "sets/b/x.tar: no prefix"),
        ("pipe:{a,b}", "pipe: is refused"),
    ):
        with pytest.raises(ShardError, match=message):
            expand_shards([wrong], ACCESS)
    with pytest.raises(ShardError, match="it is empty"):
        expand_shards([f"{url}/0.tar"])
