"""Addresses that a judge may be reached at: questions and keys must not end up where nobody meant them to go."""

import ipaddress
import re
import socket
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from tiltmeter.errors import UserError

KEY = "judge.base_url"
_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
"""Names, IPv4 in any spelling, IPv6; nothing that two parsers of addresses could read in two ways."""


class Endpoint(NamedTuple):
    """Address of a judge."""

    url: str
    """Base of the API, without a slash at the end."""
    hostname: str
    name: str
    """Host for people, with the port where it is given."""
    is_local: bool
    """Whether it is reached directly, past any proxy."""


def parse_endpoint(url: str, *, allow_local: bool) -> Endpoint:
    """Take an address apart: https to anywhere, http to local servers alone, and those only with ``allow_local``.

    Raises:
        UserError: not http(s), no host, credentials or a query in it, a port that is none, a link-local or unspecified
            address (cloud metadata), or one that needs ``allow_local`` or https.

    >>> parse_endpoint("https://api.openai.com/v1/", allow_local=False).url
    'https://api.openai.com/v1'
    """
    scheme, host, port = _split(url)
    name = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    reach = _reach(host)
    if reach == "nowhere":
        raise UserError(f"{KEY}: {name} is link-local, cloud metadata or no host's address; expected a judge's own one")
    if reach == "private" and not allow_local:
        raise UserError(
            f"{KEY}: {name} is a private or loopback address; set judge.allow_local=true if the judge is there"
        )
    if scheme == "http" and (not allow_local or reach == "public"):
        raise UserError(f"{KEY}: http:// is for local servers alone (judge.allow_local=true), got {name}: use https://")
    return Endpoint(url.rstrip("/"), host, name, scheme == "http" or reach == "private")


def _split(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address that has nothing else but a path. Raises UserError."""
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
    return parts.scheme, host, port


def _reach(host: str) -> Literal["name", "nowhere", "private", "public"]:
    """Kind of address that a host is; ``nowhere``: link-local (cloud metadata) or no host's at all."""
    address = _address(host)
    if address is None:
        return "name"
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        return "nowhere"
    return "public" if address.is_global else "private"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, in any spelling that the system takes (decimal, shortened, IPv4 in IPv6); None: a name."""
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return getattr(address, "ipv4_mapped", None) or address
