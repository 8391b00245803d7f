"""Which addresses a judge may be reached at: questions and keys must not end up where nobody meant them to go."""

import asyncio
import ipaddress
import re
import socket
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from tiltmeter.errors import UserError

KEY = "judge.base_url"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Reach = Literal["public", "local", "never"]

_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
"""Names, IPv4 in any spelling, IPv6; nothing that two parsers of addresses could read in two ways."""
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local; cloud metadata
        "fe80::/10",
        "fd00:ec2::/32",  # AWS metadata
        "100.100.100.200/32",  # Alibaba metadata
        "168.63.129.16/32",  # Azure's host, though the address is public
        "192.0.0.192/32",  # Oracle metadata
        "0.0.0.0/8",  # this host by a name that hides it
        "::/128",
        "224.0.0.0/4",  # multicast, reserved, broadcast
        "240.0.0.0/4",
        "ff00::/8",
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


class Endpoint(NamedTuple):
    """Where a judge is."""

    url: str
    """Base of the API, without a slash at the end."""
    hostname: str
    port: int
    name: str
    """Host for people, with the port where it is given."""
    is_https: bool
    allow_local: bool


def parse_endpoint(url: str, *, allow_local: bool) -> Endpoint:
    """Take an address apart and refuse what is wrong by its looks; see :func:`check_addresses` for what needs the network.

    Raises:
        UserError: not http(s), no host, credentials or a query in it, a port that is none, or an address that is never
            allowed or needs ``allow_local``; http without ``allow_local``, since it is for local addresses alone.

    >>> parse_endpoint("https://api.openai.com/v1/", allow_local=False).url
    'https://api.openai.com/v1'
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(
            f"{KEY}: expected an address such as https://api.openai.com/v1, got one with a bad port or host"
        ) from None
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{KEY}: expected https:// (or http:// for a local server), got {parts.scheme or 'no scheme'}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{KEY}: expected an address without user, password, ? or #; name the key's variable in judge.api_key_env"
        )
    host = (parts.hostname or "").lower()
    if not _HOST.fullmatch(host) or "\\" in url or not url.isprintable() or " " in url:
        raise UserError(f"{KEY}: expected a plain host name or IP address, got {host!r}")
    is_https = parts.scheme == "https"
    name = f"[{host}]" if ":" in host else host
    endpoint = Endpoint(
        url.rstrip("/"),
        host,
        port or (443 if is_https else 80),
        name if port is None else f"{name}:{port}",
        is_https,
        allow_local,
    )
    if not is_https and not allow_local:
        raise UserError(
            f"{KEY}: http:// is for local servers alone, got {endpoint.name}: use https://, or set judge.allow_local=true"
        )
    if (literal := _literal(host)) is not None:
        _check(endpoint, literal)
    elif host == "localhost" or host.endswith(".localhost"):
        _check(endpoint, ipaddress.ip_address("127.0.0.1"))
    return endpoint


async def check_addresses(endpoint: Endpoint) -> bool:
    """Look the host up and refuse it unless every address that it has is allowed.

    A name could change its address between this and the connection. For public names that gains nobody anything: they are
    reached over https alone, and a server without the name's certificate gets neither key nor question.

    Returns:
        Whether it is on this machine or in a private network. A name that can't be looked up is not (a proxy may know it).

    Raises:
        UserError: as :func:`parse_endpoint`, for any of the addresses.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.hostname, endpoint.port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return "local" in [_check(endpoint, ipaddress.ip_address(where[0])) for *_, where in found]


def reach(address: Address) -> Reach:
    """Where an address leads, seen through every way to write an IPv4 address as IPv6.

    >>> [reach(ipaddress.ip_address(x)) for x in ("1.1.1.1", "10.0.0.1", "::ffff:169.254.169.254")]
    ['public', 'local', 'never']
    """
    address = _unwrapped(address)
    if any(address in network for network in _NEVER):
        return "never"
    return "public" if address.is_global else "local"


def _check(endpoint: Endpoint, address: Address) -> Reach:
    where = reach(address)
    at = endpoint.name if str(address) == endpoint.hostname else f"{endpoint.name} ({address})"
    if where == "never":
        raise UserError(
            f"{KEY}: {at} is link-local, cloud metadata or no host's address; expected a judge's own address"
        )
    if where == "local" and not endpoint.allow_local:
        raise UserError(
            f"{KEY}: {at} is a private or loopback address; set judge.allow_local=true if the judge is there"
        )
    if where == "public" and not endpoint.is_https:
        raise UserError(
            f"{KEY}: {at} is a public address, where http:// would show everything on the way; use https://"
        )
    return where


def _literal(host: str) -> Address | None:
    """The address that a host name is, in any spelling that the system takes (decimal, hexadecimal, octal, shortened)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None


def _unwrapped(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
    if inner is None and (address in _NAT64 or (address in _COMPATIBLE and int(address) > 1)):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return inner or address
