import asyncio
import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltmeter.errors import UserError
from tiltmeter.judges.endpoint_url import check_addresses, parse_endpoint, reach

METADATA = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376",
    "169.254.43518",
]
METADATA += [
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[::a9fe:a9fe]",
]
METADATA += ["[fd00:ec2::254]", "[fe80::1]", "100.100.100.200", "168.63.129.16", "192.0.0.192"]
NO_HOST = ["0.0.0.0", "0", "[::]", "224.0.0.1", "255.255.255.255", "[ff02::1]"]
LOCAL = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "localhost",
    "LOCALHOST",
    "a.localhost",
]
LOCAL += ["10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fd12::1]", "[::ffff:10.0.0.1]"]


@pytest.mark.parametrize("allow_local", [True, False])
@pytest.mark.parametrize("host", METADATA + NO_HOST)
def test_metadata_and_no_hosts_are_refused_in_every_spelling(host: str, allow_local: bool) -> None:
    with pytest.raises(UserError, match=r"^judge\.base_url: .*link-local"):
        parse_endpoint(f"https://{host}/v1", allow_local=allow_local)


@pytest.mark.parametrize("host", LOCAL)
def test_local_addresses_need_leave(host: str) -> None:
    with pytest.raises(UserError, match=r"^judge\.base_url: .*judge\.allow_local=true"):
        parse_endpoint(f"https://{host}:8000/v1", allow_local=False)
    assert parse_endpoint(f"http://{host}:8000/v1", allow_local=True).port == 8000


@pytest.mark.parametrize("url", ["http://api.openai.com/v1", "http://8.8.8.8/v1"])
def test_http_is_for_local_addresses_alone(url: str) -> None:
    with pytest.raises(UserError, match=r"^judge\.base_url: .*https"):
        parse_endpoint(url, allow_local=False)


def test_http_to_a_public_address_is_refused_also_where_local_ones_are_allowed() -> None:
    with pytest.raises(UserError, match="public address"):
        parse_endpoint("http://8.8.8.8/v1", allow_local=True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com/v1",
        "file:///etc/passwd",
        "ftp://example.org",
        "https://",
        "https:///v1",
        "https://user:secret-canary@example.org/v1",
        "https://secret-canary@example.org/v1",
        "https://example.org/v1?key=secret-canary",
        "https://example.org/v1#secret-canary",
        "https://example.org:99999/v1",
        "https://example.org:x/v1",
        "https://example.org\\@169.254.169.254/v1",
        "https://exa mple.org/v1",
        "https://example.org/v1\n",
        "https://①②⑦.0.0.1/v1",
        "https://[::1%25eth0]/v1",
        "https://[::1/v1",
        "https://%31%32%37.0.0.1/v1",
    ],
)
def test_addresses_that_are_none_or_hold_a_secret(url: str) -> None:
    with pytest.raises(UserError, match=r"^judge\.base_url: expected") as caught:
        parse_endpoint(url, allow_local=True)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "api.openai.com"),
        ("https://API.openai.com/v1/", "api.openai.com"),
        ("https://my_host.example.org:8443", "my_host.example.org:8443"),
        ("https://[2606:4700::1111]:8443/v1", "[2606:4700::1111]:8443"),
    ],
)
def test_the_host_has_a_name(url: str, name: str) -> None:
    endpoint = parse_endpoint(url, allow_local=False)
    assert (endpoint.name, endpoint.url) == (name, url.rstrip("/"))


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254"])
def test_a_name_that_leads_to_metadata_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "1.1.1.1", address)
    for url in ("https://judge.example.org/v1", "http://judge.example.org/v1"):
        with pytest.raises(UserError, match=r"link-local|public"):
            asyncio.run(check_addresses(parse_endpoint(url, allow_local=True)))


def test_a_name_that_leads_inside_needs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "1.1.1.1", "10.0.0.7")
    with pytest.raises(UserError, match=r"judge\.example\.org \(10\.0\.0\.7\) is a private .*judge\.allow_local"):
        asyncio.run(check_addresses(parse_endpoint("https://judge.example.org", allow_local=False)))
    assert asyncio.run(check_addresses(parse_endpoint("https://judge.example.org", allow_local=True)))


def test_a_public_name_is_not_local_and_an_unknown_one_is_left_to_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = parse_endpoint("https://judge.example.org", allow_local=True)
    resolve(monkeypatch, "1.1.1.1")
    assert not asyncio.run(check_addresses(endpoint))

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert not asyncio.run(check_addresses(endpoint))


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_leads_to_the_same_place_in_every_ipv6_dress(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for dress in (0xFFFF << 32 | number, int(ipaddress.ip_address("64:ff9b::")) | number, 0x2002 << 112 | number << 80):
        assert reach(ipaddress.IPv6Address(dress)) == reach(address)
