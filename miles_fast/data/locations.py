"""Where shards may be read from: local files always, https, http and s3 only below allowed prefixes.

No name ever reaches a shell, and no other scheme is known. Of http(s) the address is checked too, at each
redirect: a name that somebody else controls must not lead to what only this machine can reach.
"""

from __future__ import annotations

import glob
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from miles_fast.data.shard_index import ShardError

REMOTE_SCHEMES = ("https", "http", "s3")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PORTS = {"https": 443, "http": 80}
_NAT64, _COMPATIBLE = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class Access:
    """What may be read, and how patiently.

    `prefixes` are URLs that allowed ones start with, by whole segments of their paths. An attempt gives up
    after `timeout_seconds` without progress. `s3_endpoint` is trusted. `typed`: the prefix is the host of a
    URL that the user typed; it may be at a private address, and redirect to https of the open internet.
    """

    prefixes: tuple[str, ...] = ()
    typed: bool = False
    attempts: int = 6
    timeout_seconds: float = 30.0
    s3_endpoint: str | None = None

    def __post_init__(self) -> None:
        for prefix in self.prefixes:
            try:
                parse_url(prefix)
            except ShardError as error:
                raise ShardError(f"data.allowed_prefixes: {error}") from error


LOCAL_ONLY = Access()


@dataclass(frozen=True, kw_only=True)
class Location:
    """The parts of a URL that are compared and connected to."""

    scheme: str
    host: str
    port: int | None
    segments: tuple[str, ...]


def scheme_of(name: str) -> str | None:
    """Scheme of a shard's name in lower case, None for a plain path."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else None


def is_remote(name: str | Path) -> bool:
    """Whether a shard's name is a URL."""
    return isinstance(name, str) and scheme_of(name) in REMOTE_SCHEMES


def local_path(name: str) -> str | None:
    """The path (or pattern) that a name without a remote scheme means, None for a remote one.

    Raises ShardError for every scheme but file, https, http and s3.
    """
    scheme = scheme_of(name)
    if scheme is None:
        return name
    if scheme in REMOTE_SCHEMES:
        return None
    if scheme != "file":
        raise ShardError(
            f"{name}: {scheme}: is refused, shards are files, https:, http: or s3: (no command is ever run "
            "for one); a file with a colon in its name is written ./NAME"
        )
    path = name[len("file:") :]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host not in ("", "localhost"):
            raise ShardError(f"{name}: file: of another host ({host}); write file:///PATH")
        path = slash + path
    return unquote(path)


def shown(url: str) -> str:
    """A URL for messages, without user and password, and without its query, which may hold a signature."""
    place, mark, _ = url.partition("?")
    return re.sub("//[^/]*@", "//", place) + ("?..." if mark else "")


def parse_url(url: str) -> Location:
    """The parts of an https, http or s3 URL. Raises ShardError for one that can be read in two ways."""
    name = shown(url)
    if not url.isascii() or any(c.isspace() or not c.isprintable() or c == "\\" for c in url):
        raise ShardError(f"{name!r}: white space, control characters, backslashes and non-ASCII are refused")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ShardError(f"{name}: not a URL ({error})") from error
    if parts.scheme not in REMOTE_SCHEMES:
        raise ShardError(f"{name}: expected one of {', '.join(s + '://' for s in REMOTE_SCHEMES)}")
    if not parts.hostname:
        raise ShardError(f"{name}: names no host")
    if "@" in parts.netloc:
        raise ShardError(f"{name}: a user or password in a URL is refused; remove it")
    if parts.fragment:
        raise ShardError(f"{name}: a fragment (#) is refused; write # as %23")
    segments = _segments(name, parts.path)
    return Location(
        scheme=parts.scheme,
        host=parts.netloc if parts.scheme == "s3" else parts.hostname,
        port=port or _PORTS.get(parts.scheme),
        segments=segments,
    )


def _segments(name: str, path: str) -> tuple[str, ...]:
    decoded = path
    for _ in range(4):  # %252e%252e and deeper: some server on the way may decode once more
        again = unquote(decoded)
        if {".", ".."} & set(re.split(r"[/\\]", again)):
            raise ShardError(f"{name}: '.' and '..' in a URL's path are refused, percent-encoded or not")
        if again == decoded:
            return tuple(path.removeprefix("/").split("/")) if path.strip("/") else ()
        decoded = again
    raise ShardError(f"{name}: its path is percent-encoded several times over; write it once")


def check_url(url: str, access: Access) -> Location:
    """The parts of a URL that the access allows. Raises ShardError for any other."""
    place = parse_url(url)
    if _is_listed(place, access):
        return place
    listed = f"it lists {', '.join(access.prefixes)}" if access.prefixes else "it is empty"
    raise ShardError(
        f"{shown(url)}: no prefix in data.allowed_prefixes allows this URL ({listed}); add one that does "
        f"(--allow, where there is no config), such as '{place.scheme}://{_authority(place)}/', if you trust "
        "it"
    )


def access_to(url: str) -> Access:
    """Access to the host (bucket) of a URL that the user typed."""
    place = parse_url(url)
    return Access(prefixes=(f"{place.scheme}://{_authority(place)}/",), typed=True)


def check_redirect(url: str, access: Access) -> tuple[Location, Access]:
    """The parts of a URL that another one leads to, and the access that its addresses are checked by."""
    if not access.typed:
        return check_url(url, access), access
    place = parse_url(url)
    if _is_listed(place, access):
        return place, access
    if place.scheme != "https":
        raise ShardError(f"{shown(url)}: to another host only https: is followed; name the file's own URL")
    return place, replace(access, prefixes=())


def _is_listed(place: Location, access: Access) -> bool:
    for prefix in access.prefixes:
        allowed = parse_url(prefix)
        head = allowed.segments[:-1] if allowed.segments[-1:] == ("",) else allowed.segments
        same = (place.scheme, place.host, place.port) == (allowed.scheme, allowed.host, allowed.port)
        if same and place.segments[: len(head)] == head:
            return True
    return False


def _authority(place: Location) -> str:
    host = f"[{place.host}]" if ":" in place.host else place.host
    return host if place.port in (None, _PORTS.get(place.scheme)) else f"{host}:{place.port}"


def check_addresses(url: str, host: str, found: Iterable[str], access: Access) -> None:
    """Refuse a host one of whose addresses is not of the open internet and was not listed itself.

    Listed is an address that is the host of an allowed prefix; `localhost` lists the loopback addresses, and
    a host that the user typed its private ones.
    """
    hosts = {parse_url(prefix).host for prefix in access.prefixes if not prefix.startswith("s3:")}
    listed = {_embedded(ipaddress.ip_address(name)) for name in hosts if _is_address(name)}
    for text in found:
        address = _embedded(ipaddress.ip_address(text))
        kind = _kind(address)
        if kind is None or address in listed:
            continue
        if kind == "loopback" and host == "localhost" and host in hosts:
            continue
        if kind == "private" and access.typed and host in hosts:
            continue
        said = f"http://{f'[{text}]' if ':' in text else text}/"
        remedy = f"list the address as well: '{said}' in data.allowed_prefixes"
        raise ShardError(
            f"{shown(url)}: {host} is at {text}, a {kind} address, which is refused; if it is meant, "
            f"{f'write {said}' if access.typed else remedy}"
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, else the address."""
    if isinstance(address, ipaddress.IPv4Address) or address.is_loopback or address.is_unspecified:
        return address
    if address in _NAT64 or address in _COMPATIBLE:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _kind(address: Address) -> str | None:
    for kind in ("loopback", "link_local", "multicast", "unspecified"):
        if getattr(address, f"is_{kind}"):
            return kind.replace("_", "-")
    return None if address.is_global else "private"


def expand_shards(
    patterns: str | Path | Sequence[str | Path], access: Access = LOCAL_ONLY
) -> list[Path | str]:
    """Files that the patterns name (braces, then globs), then URLs (braces), each once, sorted.

    Raises ShardError for a pattern that names no file, and for a URL that is not allowed.
    """
    files: set[Path] = set()
    urls: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        text = str(pattern)
        path = text if isinstance(pattern, Path) else local_path(text)
        expanded = expand_braces(text if path is None else path)
        if path is None:
            urls.update(_checked(url, access) for url in expanded)
            continue
        matches = {
            Path(match) for one in expanded for match in ([one] if os.path.isfile(one) else glob.glob(one))
        }
        if not matches:
            raise ShardError(
                f"no shard matches {text!r} (working directory {os.getcwd()}): correct the "
                "path, or write shards with `python launch/prepare.py INPUT --output DIR`: 'DIR/*.tar'"
            )
        files |= matches
    return [*sorted(files), *sorted(urls)]


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern's braces stand for. Raises ShardError."""
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ShardError(
            f"shard pattern {shown(pattern)!r}: {error}; write it as 'data/{{00000..00041}}.tar'"
        ) from error


def _checked(url: str, access: Access) -> str:
    place = check_url(url, access)
    if "*" in url:
        raise ShardError(
            f"{shown(url)}: remote folders are not listed; write '{{00000..00041}}' instead of a *"
        )
    if not place.segments or not place.segments[-1].endswith(".tar"):
        raise ShardError(f"{shown(url)}: expected the URL of a shard, whose path ends in .tar")
    return url
