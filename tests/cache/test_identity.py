from __future__ import annotations

import hmac
import inspect
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache import identity as module
from dockerproxy.cache.identity import PUBLIC, TOKEN_LIFETIME, Bindings, Identities
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Registry
from dockerproxy.store.files import Staging
from dockerproxy.store.secret import load_or_create_secret
from dockerproxy.upstream.credentials import Anonymous, ClientCredential

HUB, OTHER = Registry.parse("registry-1.docker.io"), Registry.parse("other.example:5000")
NOW = 1_700_000_000.0
IDENTITIES = Identities(b"s" * 32)


def test_identity_per_credential() -> None:
    assert IDENTITIES.for_credential(HUB, Anonymous()) == PUBLIC
    one, other = (
        IDENTITIES.for_credential(HUB, ClientCredential("Bearer a")),
        IDENTITIES.for_credential(HUB, ClientCredential("Bearer b")),
    )
    assert one != other and one.startswith("own:") and one == IDENTITIES.for_authorization("Bearer a")
    login = IDENTITIES.for_credential(HUB, BasicCredentials("me", "secret"))
    assert login.startswith("login:")
    assert login == IDENTITIES.for_credential(
        HUB, BasicCredentials("me", "another")
    )  # a new password does not change the identity
    assert login != IDENTITIES.for_credential(HUB, BasicCredentials("you", "secret"))
    assert login != IDENTITIES.for_credential(OTHER, BasicCredentials("me", "secret"))


def test_identity_does_not_reveal_credential() -> None:
    for text in (
        IDENTITIES.for_credential(HUB, ClientCredential("Basic bWU6c2VjcmV0")),
        IDENTITIES.for_credential(HUB, BasicCredentials("me", "secret")),
    ):
        assert "secret" not in text and "bWU6" not in text and "me" not in text.partition(":")[2]
    assert Identities(b"t" * 32).for_credential(HUB, ClientCredential("Bearer a")) != IDENTITIES.for_credential(
        HUB, ClientCredential("Bearer a")
    )


def test_authorization_with_arbitrary_bytes() -> None:
    assert IDENTITIES.for_authorization("Basic \xff\udc80") != IDENTITIES.for_authorization("Basic \xff")


def test_bound_token_has_client_identity() -> None:
    identities = Identities(b"s" * 32)
    identities.bind("abc", "Basic bWU6c2VjcmV0")
    assert identities.for_credential(HUB, ClientCredential("Bearer abc")) == identities.for_authorization(
        "Basic bWU6c2VjcmV0"
    )
    assert identities.for_credential(HUB, ClientCredential("Bearer abd")) != identities.for_authorization(
        "Basic bWU6c2VjcmV0"
    )


def test_bindings_are_shared_between_processes() -> None:
    published: list[tuple[str, str]] = []
    bindings = Bindings()
    bindings.subscribe(lambda token, client: published.append((token, client)))
    one = Identities(b"s" * 32, bindings)
    one.bind("abc", "Basic bWU6c2VjcmV0")
    bindings = Bindings()
    bindings.subscribe(lambda token, client: published.append(("again", token)))
    for pair in list(published):
        bindings.add(*pair)
    other = Identities(b"s" * 32, bindings)
    assert other.for_credential(HUB, ClientCredential("Bearer abc")) == one.for_credential(
        HUB, ClientCredential("Basic bWU6c2VjcmV0")
    )
    assert other.for_credential(HUB, ClientCredential("Bearer abcd")) != one.for_credential(
        HUB, ClientCredential("Basic bWU6c2VjcmV0")
    )
    assert len(published) == 1
    assert not any("abc" in text or "bWU" in text for text in published[0])


def test_bindings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BINDINGS", 3)
    identities = Identities(b"s" * 32)
    for number in range(5):
        identities.bind(str(number), "Basic x")
    me = identities.for_authorization("Basic x")
    assert [identities.for_credential(HUB, ClientCredential(f"Bearer {number}")) == me for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("identity", [PUBLIC, "own:0123"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_local_token(identity: str, scheme: str) -> None:
    token = IDENTITIES.issue_token(HUB, identity, NOW)
    assert IDENTITIES.read_token(HUB, f"{scheme} {token}", NOW) == identity
    assert IDENTITIES.read_token(HUB, f"{scheme} {token}", NOW + TOKEN_LIFETIME - 1) == identity
    assert Identities(b"s" * 32).read_token(HUB, f"{scheme} {token}", NOW) == identity  # after a restart


@pytest.mark.parametrize("authorization", ["Basic drp.x", "Bearer abc", "Bearer", "", "Bearer xdrp.", "drp.x"])
def test_foreign_token(authorization: str) -> None:
    assert IDENTITIES.read_token(HUB, authorization, NOW) is None


def test_expired_token() -> None:
    token = IDENTITIES.issue_token(HUB, PUBLIC, NOW)
    assert IDENTITIES.read_token(HUB, f"Bearer {token}", NOW + TOKEN_LIFETIME) == ""


def test_token_of_another_registry() -> None:
    assert IDENTITIES.read_token(OTHER, f"Bearer {IDENTITIES.issue_token(HUB, PUBLIC, NOW)}", NOW) == ""


def test_token_with_another_secret() -> None:
    assert IDENTITIES.read_token(HUB, f"Bearer {Identities(b't' * 32).issue_token(HUB, PUBLIC, NOW)}", NOW) == ""


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_altered_token(position: int, mask: int) -> None:
    signed = bytearray(urlsafe_b64decode(IDENTITIES.issue_token(HUB, "own:0123", NOW).removeprefix("drp.")))
    signed[position % len(signed)] ^= mask
    assert IDENTITIES.read_token(HUB, f"Bearer drp.{urlsafe_b64encode(bytes(signed)).decode()}", NOW) == ""


@given(st.one_of(st.text(), st.binary().map(lambda data: urlsafe_b64encode(data).decode())))
def test_forged_token(text: str) -> None:
    assert IDENTITIES.read_token(HUB, f"Bearer drp.{text}", NOW) in ("", None)


def test_identity_hash_is_not_a_token_signature() -> None:
    """The same secret is used for identities, but their hashes must not be valid signatures of tokens."""
    payload = f"{HUB}\nown:0123\n{int(NOW) + TOKEN_LIFETIME}".encode()
    plain = hmac.new(b"s" * 32, payload, "sha256").digest()
    assert IDENTITIES.read_token(HUB, f"Bearer drp.{urlsafe_b64encode(payload + plain).decode()}", NOW) == ""


def test_signatures_are_compared_in_constant_time() -> None:
    assert "hmac.compare_digest" in inspect.getsource(Identities.read_token)


def test_secret_is_persistent(tmp_path: Path) -> None:
    path = tmp_path / "secret"

    def identities() -> Identities:
        return Identities(load_or_create_secret(path, Staging(str(tmp_path / "staging"), private=True)))

    token = identities().issue_token(HUB, PUBLIC, NOW)
    assert path.stat().st_mode & 0o777 == 0o600
    assert identities().read_token(HUB, f"Bearer {token}", NOW) == PUBLIC
    path.write_bytes(b"")  # a crash during its creation
    assert identities().read_token(HUB, f"Bearer {token}", NOW) == ""
    assert len(path.read_bytes()) == 32 and path.stat().st_mode & 0o777 == 0o600
