"""Tokens, cookies, rates and hosts, as values."""

from __future__ import annotations

import pytest

from koan_ray.config import Settings, WebLimits, WebSettings
from koan_ray.errors import ConfigurationError
from koan_ray.web.guard import is_deeper
from koan_ray.web.security import (
    Credentials,
    Hosts,
    Principal,
    Rates,
    Role,
    host_name,
    new_token,
    origin_of,
    token,
    tokens_of,
)
from koan_ray.web.serving import Door, is_loopback, read_token, url

SECRET = "a-token-that-is-long-enough"


class Clock:
    def __init__(self):
        self.at = 1_000_000.0

    def __call__(self):
        return self.at


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def credentials(clock):
    return Credentials([token("ada", SECRET, ["operator"]), token("root", new_token())], 3600, b"key", clock)


def test_a_token_is_known_by_its_digest(credentials):
    assert credentials.by_token(SECRET).name == "ada"
    for wrong in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), "x" * 10_000, "é", "\ud800"):
        assert credentials.by_token(wrong) is None


def test_all_tokens_are_compared_whichever_it_is(monkeypatch, credentials):
    from koan_ray.web import security

    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    credentials.by_token(SECRET)
    credentials.by_token("nobodys")
    assert len(compared) == 4


def test_a_token_expires(clock):
    principal = Principal.of("ada", ["viewer"], clock.at + 10)
    credentials = Credentials(
        [token("x", "y" * 20), type(token("x", "y"))(principal, token("ada", SECRET).digest)], 3600, b"k", clock
    )
    value, _ = credentials.cookie(credentials.by_token(SECRET))
    assert credentials.by_cookie(value).name == "ada"
    clock.at += 10
    assert credentials.by_token(SECRET) is None
    assert credentials.by_cookie(value) is None


def test_a_cookie_has_the_rights_of_its_token_and_dies_with_it(clock, credentials):
    value, with_cookie = credentials.cookie(credentials.by_token(SECRET))
    seen = credentials.by_cookie(value)
    assert seen == with_cookie
    assert seen.roles == {Role.PUBLIC, Role.VIEWER, Role.OPERATOR}
    assert seen.csrf
    fewer = Credentials([token("ada", SECRET, ["viewer"])], 3600, b"key", clock)
    assert fewer.by_cookie(value).roles == {Role.PUBLIC, Role.VIEWER}
    assert Credentials([token("ada", "another-token-of-the-same-name")], 3600, b"key", clock).by_cookie(value) is None
    assert Credentials([token("bob", SECRET)], 3600, b"key", clock).by_cookie(value) is None
    assert Credentials([token("ada", SECRET)], 3600, b"other key", clock).by_cookie(value) is None
    clock.at += 3600
    assert credentials.by_cookie(value) is None


def test_two_cookies_have_two_second_tokens(credentials):
    principal = credentials.by_token(SECRET)
    (one, first), (two, second) = credentials.cookie(principal), credentials.cookie(principal)
    assert one != two
    assert first.csrf != second.csrf


def test_a_bucket_lets_a_burst_through_and_then_the_rate(clock):
    rates = Rates(2.0, 3, clock)
    assert [rates.wait_s("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rates.wait_s("b") == 0
    clock.at += 0.5
    assert rates.wait_s("a") == 0
    assert rates.wait_s("a") > 0
    for n in range(20_000):
        rates.wait_s(str(n))
    assert len(rates._buckets) <= 10_000


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost", "localhost"), ("LocalHost:80", "localhost"), ("[::1]:8267", "::1"), ("127.0.0.1", "127.0.0.1"),
     ("", None), ("a/b", None), ("user@localhost", None), ("localhost:x", None), ("localhost:99999", None),
     ("localhost?x", None), ("[::1", None)],
)  # fmt: skip
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name


def test_origins_are_compared_with_scheme_and_port():
    hosts = Hosts(["localhost", "::1"], "https://jobs.example.com")
    assert hosts.has("jobs.example.com")
    assert hosts.is_own("http://localhost:8267", "http", "localhost:8267")
    assert hosts.is_own("http://localhost", "http", "localhost:80")
    assert hosts.is_own("https://jobs.example.com", "http", "10.0.0.7:8267")
    for foreign in ("http://localhost", "https://localhost:8267", "http://jobs.example.com", "null", "", "file://x"):
        assert not hosts.is_own(foreign, "http", "localhost:8267"), foreign
    assert origin_of("http://[::1]:80") == ("http", "::1", 80)


@pytest.mark.parametrize(
    ("body", "depth"),
    [(b"1", 0), (b'"[[[["', 0), (b"[]", 1), (b'{"a": [1]}', 2), (b'{"\\"[[": {}}', 2), (b"[" * 50, 50),
     (b'"' + b"[" * 50, 0),
     (b"[[]]" * 20, 2), (b'["\\\\", [[]]]', 3)],
)  # fmt: skip
def test_depth_is_that_of_brackets_outside_of_strings(body, depth):
    assert not is_deeper(body, depth)
    assert depth == 0 or is_deeper(body, depth - 1)


# --- where it may listen ---------------------------------------------------------------------------------------------


def settings(**web):
    return Settings(web={"allowed_hosts": ["jobs.example.com"], **web})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_on_loopback_a_token_is_made_once(host):
    door = Door(settings(host=host))
    assert len(door.generated) >= 40
    assert len(door.tokens) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "jobs.example.com", "127.0.0.1.example.com", ""])
def test_anywhere_else_it_refuses_to_start_without_a_token(host):
    with pytest.raises(ConfigurationError, match=r"no token is configured.*--generate-token"):
        Door(settings(host=host))
    assert Door(settings(host=host), makes_token=True).generated
    configured = settings(host=host, tokens=[{"name": "a", "roles": "viewer", "token": "x" * 24}])
    assert Door(configured).generated is None


def test_every_address_needs_a_name_that_it_is_called_by():
    with pytest.raises(ConfigurationError, match="allowed_hosts or public_url"):
        Door(Settings(web={"host": "0.0.0.0"}), makes_token=True)
    Door(Settings(web={"host": "0.0.0.0", "public_url": "https://jobs.example.com"}), makes_token=True)


def test_a_token_file_is_read_if_nobody_else_can(tmp_path):
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        read_token(str(path))
    path.chmod(0o600)
    assert read_token(str(path)) == SECRET
    door = Door(settings(host="0.0.0.0"), str(path))
    assert door.generated is None
    path.write_text("short")
    with pytest.raises(ConfigurationError, match="20 to 200"):
        read_token(str(path))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_token(str(tmp_path / "none"))


def test_addresses():
    assert is_loopback("[::1]")
    assert not is_loopback("0.0.0.0")
    assert url(settings(), 5) == "http://127.0.0.1:5"
    assert url(settings(host="::1")) == "http://[::1]:8267"
    assert url(settings(public_url="https://jobs.example.com")) == "https://jobs.example.com"


# --- settings --------------------------------------------------------------------------------------------------------


def test_tokens_come_from_the_settings():
    import hashlib

    web = WebSettings(tokens=[
        {"name": "a", "roles": ["viewer", "operator"], "token": SECRET},
        {"name": "b", "roles": "admin", "sha256": hashlib.sha256(b"other").hexdigest(),
         "expires_at": "2030-01-01T00:00:00Z"},
    ])  # fmt: skip
    one, two = tokens_of(web.tokens)
    assert one.digest == hashlib.sha256(SECRET.encode()).digest()
    assert two.principal.expires_at == 1893456000.0
    assert two.principal.may(Role.ADMIN)
    assert SECRET not in repr(web)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"tokens": [{"name": "a", "roles": "viewer", "token": "short-secret"}]}, "20 to 200"),
        ({"tokens": [{"name": "a", "roles": [], "token": SECRET}]}, "roles"),
        ({"tokens": [{"name": "a", "roles": "king", "token": SECRET}]}, "viewer"),
        ({"tokens": [{"name": "a", "roles": "viewer"}]}, "either token or sha256"),
        ({"tokens": [{"name": "a", "roles": "viewer", "token": SECRET}] * 2}, "two tokens are named 'a'"),
        ({"tokens": [{"name": "a", "roles": "viewer", "tokn": SECRET}]}, "did you mean 'token'"),
        ({"session_key": "short-secret"}, "at least 20"),
        ({"port": 70_000}, "web.port"),
        ({"limits": {"page": 2000}}, "web.limits.page"),
        ({"limits": {"boddy": 1}}, "did you mean 'body'"),
    ],
)
def test_settings_that_cannot_be_used_are_named_without_their_secrets(given, problem):
    with pytest.raises(ConfigurationError) as raised:
        Settings(web=given)
    assert problem in str(raised.value)
    assert SECRET not in str(raised.value)
    assert "short-secret" not in str(raised.value)


def test_the_limits_are_those_of_the_documentation():
    limits = WebLimits()
    assert (limits.body, limits.depth, limits.page, limits.websockets, limits.streams) == (1_048_576, 32, 500, 100, 500)
