from __future__ import annotations

import hmac
import inspect
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache import identity as module
from dockerproxy.cache.identity import LIFETIME, PUBLIC, Bindings, Identities
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.credentials import Anonymous, Configured, Own

HUB, OTHER = Registry.parse("registry-1.docker.io"), Registry.parse("other.example:5000")
NOW = 1_700_000_000.0
OURS = Identities(b"s" * 32)


def test_who_is_who() -> None:
    assert OURS.of(HUB, Anonymous()) == PUBLIC
    one, other = OURS.of(HUB, Own("Bearer a")), OURS.of(HUB, Own("Bearer b"))
    assert one != other and one.startswith("own:") and one == OURS.of_authorization("Bearer a")
    login = OURS.of(HUB, Configured("me", "secret"))
    assert login.startswith("login:")
    assert login == OURS.of(HUB, Configured("me", "another"))  # the password may change, the one who reads does not
    assert login != OURS.of(HUB, Configured("you", "secret"))
    assert login != OURS.of(OTHER, Configured("me", "secret"))


def test_nothing_of_a_credential_is_in_its_identity() -> None:
    for text in (OURS.of(HUB, Own("Basic bWU6c2VjcmV0")), OURS.of(HUB, Configured("me", "secret"))):
        assert "secret" not in text and "bWU6" not in text and "me" not in text.partition(":")[2]
    assert Identities(b"t" * 32).of(HUB, Own("Bearer a")) != OURS.of(HUB, Own("Bearer a"))


def test_any_bytes_may_be_an_authorization() -> None:
    assert OURS.of_authorization("Basic \xff\udc80") != OURS.of_authorization("Basic \xff")


def test_a_token_is_the_one_it_was_given_to() -> None:
    identities = Identities(b"s" * 32)
    identities.bind("abc", "Basic bWU6c2VjcmV0")
    assert identities.of(HUB, Own("Bearer abc")) == identities.of_authorization("Basic bWU6c2VjcmV0")
    assert identities.of(HUB, Own("Bearer abd")) != identities.of_authorization("Basic bWU6c2VjcmV0")


def test_what_is_bound_in_one_process_may_be_told_to_another() -> None:
    told: list[tuple[str, str]] = []
    one = Identities(b"s" * 32, Bindings(lambda token, client: told.append((token, client))))
    one.bind("abc", "Basic bWU6c2VjcmV0")
    bindings = Bindings(lambda token, client: told.append(("again", token)))
    for pair in list(told):
        bindings.note(*pair)
    other = Identities(b"s" * 32, bindings)
    assert other.of(HUB, Own("Bearer abc")) == one.of(HUB, Own("Basic bWU6c2VjcmV0"))
    assert other.of(HUB, Own("Bearer abcd")) != one.of(HUB, Own("Basic bWU6c2VjcmV0"))
    assert len(told) == 1
    assert not any("abc" in text or "bWU" in text for text in told[0])


def test_what_is_bound_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BOUND", 3)
    identities = Identities(b"s" * 32)
    for number in range(5):
        identities.bind(str(number), "Basic x")
    me = identities.of_authorization("Basic x")
    assert [identities.of(HUB, Own(f"Bearer {number}")) == me for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("who", [PUBLIC, "own:0123"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_a_token_of_ours(who: str, scheme: str) -> None:
    token = OURS.issue(HUB, who, NOW)
    assert OURS.read(HUB, f"{scheme} {token}", NOW) == who
    assert OURS.read(HUB, f"{scheme} {token}", NOW + LIFETIME - 1) == who
    assert Identities(b"s" * 32).read(HUB, f"{scheme} {token}", NOW) == who  # after a restart


@pytest.mark.parametrize("authorization", ["Basic drp.x", "Bearer abc", "Bearer", "", "Bearer xdrp.", "drp.x"])
def test_what_is_not_ours_is_the_clients(authorization: str) -> None:
    assert OURS.read(HUB, authorization, NOW) is None


def test_ended() -> None:
    token = OURS.issue(HUB, PUBLIC, NOW)
    assert OURS.read(HUB, f"Bearer {token}", NOW + LIFETIME) == ""


def test_of_another_registry() -> None:
    assert OURS.read(OTHER, f"Bearer {OURS.issue(HUB, PUBLIC, NOW)}", NOW) == ""


def test_with_another_secret() -> None:
    assert OURS.read(HUB, f"Bearer {Identities(b't' * 32).issue(HUB, PUBLIC, NOW)}", NOW) == ""


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_altered(where: int, how: int) -> None:
    signed = bytearray(urlsafe_b64decode(OURS.issue(HUB, "own:0123", NOW).removeprefix("drp.")))
    signed[where % len(signed)] ^= how
    assert OURS.read(HUB, f"Bearer drp.{urlsafe_b64encode(bytes(signed)).decode()}", NOW) == ""


@given(st.one_of(st.text(), st.binary().map(lambda data: urlsafe_b64encode(data).decode())))
def test_forged(text: str) -> None:
    assert OURS.read(HUB, f"Bearer drp.{text}", NOW) in ("", None)


def test_a_signature_for_something_else_is_none() -> None:
    """The secret also makes identities: none of its hashes is a token's."""
    payload = f"{HUB}\nown:0123\n{int(NOW) + LIFETIME}".encode()
    plain = hmac.new(b"s" * 32, payload, "sha256").digest()
    assert OURS.read(HUB, f"Bearer drp.{urlsafe_b64encode(payload + plain).decode()}", NOW) == ""


def test_signatures_are_compared_in_constant_time() -> None:
    assert "hmac.compare_digest" in inspect.getsource(Identities.read)


def test_the_secret_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "secret"
    token = Identities.open(path).issue(HUB, PUBLIC, NOW)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identities.open(path).read(HUB, f"Bearer {token}", NOW) == PUBLIC
    path.write_bytes(b"")  # a crash while it was made
    assert Identities.open(path).read(HUB, f"Bearer {token}", NOW) == ""
    assert len(path.read_bytes()) == 32 and path.stat().st_mode & 0o777 == 0o600
