import pytest

from tiltmeter.errors import UserError
from tiltmeter.judges.endpoint_url import parse_endpoint

METADATA = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376",
    "169.254.43518",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[fe80::1]",
]
NO_HOST = ["0.0.0.0", "0", "[::]", "224.0.0.1", "[ff02::1]"]
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
    with pytest.raises(UserError, match=r"^base_url: .*link-local"):
        parse_endpoint(f"https://{host}/v1", allow_local=allow_local)


@pytest.mark.parametrize("host", LOCAL)
def test_local_addresses_need_leave(host: str) -> None:
    with pytest.raises(UserError, match=r"^base_url: .*allow_local=true"):
        parse_endpoint(f"https://{host}:8000/v1", allow_local=False)
    assert parse_endpoint(f"http://{host}:8000/v1", allow_local=True).is_local


@pytest.mark.parametrize("url", ["http://api.openai.com/v1", "http://8.8.8.8/v1"])
def test_http_is_for_local_addresses_alone(url: str) -> None:
    with pytest.raises(UserError, match=r"^base_url: .*https"):
        parse_endpoint(url, allow_local=False)


def test_http_to_a_public_address_is_refused_also_where_local_ones_are_allowed() -> None:
    with pytest.raises(UserError, match="local servers alone"):
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
    with pytest.raises(UserError, match=r"^base_url: expected") as caught:
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
