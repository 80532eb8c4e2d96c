from __future__ import annotations

import hmac
import inspect
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.cache import identity as module
from dockerproxy.cache.identity import INVALID_TOKEN, PUBLIC, TOKEN_LIFETIME, Binding, Bindings, Identities, LocalToken
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Registry, Repository, parse_repository
from dockerproxy.store.files import Staging
from dockerproxy.store.secret import load_or_create_secret
from dockerproxy.upstream.credentials import Anonymous, ClientCredential

HUB, OTHER = Registry.parse("registry-1.docker.io"), Registry.parse("other.example:5000")
NOW = 1_700_000_000.0
IDENTITIES = Identities(b"s" * 32, lambda: NOW)
ALICE, REALM = "Basic bWU6c2VjcmV0", "https://auth.docker.io/token"


def identity_of(credential: Any, registry: Registry = HUB, name: str = "a/b", identities: Any = None) -> str:
    return (identities or IDENTITIES).for_credential(registry, parse_repository(name), credential)  # type: ignore[no-any-return]


def bind(
    identities: Identities,
    token: str,
    authorization: str = ALICE,
    *names: str,
    issuer: str = REALM,
    lifetime: float = 60,
) -> None:
    repositories = frozenset(map(parse_repository, names or ("a/b",)))
    identities.bind(token, issuer, authorization, repositories, NOW + lifetime)


def test_identity_per_credential() -> None:
    assert identity_of(Anonymous()) == PUBLIC
    one, other = identity_of(ClientCredential("Bearer a")), identity_of(ClientCredential("Bearer b"))
    assert one != other and one.startswith("own:") and one == IDENTITIES.for_authorization(str(HUB), "Bearer a")
    assert one != identity_of(ClientCredential("Bearer a"), OTHER)
    login = identity_of(BasicCredentials("me", "secret"))
    assert login.startswith("login:")
    assert login == identity_of(BasicCredentials("me", "another"))  # a new password does not change the identity
    assert login != identity_of(BasicCredentials("you", "secret"))
    assert login != identity_of(BasicCredentials("me", "secret"), OTHER)


def test_identity_does_not_reveal_credential() -> None:
    for text in (identity_of(ClientCredential(ALICE)), identity_of(BasicCredentials("me", "secret"))):
        assert "secret" not in text and "bWU6" not in text and "me" not in text.partition(":")[2]
    other = Identities(b"t" * 32, lambda: NOW)
    assert identity_of(ClientCredential("Bearer a"), identities=other) != identity_of(ClientCredential("Bearer a"))


def test_authorization_with_arbitrary_bytes() -> None:
    one = IDENTITIES.for_authorization("realm", "Basic \xff\udc80")
    assert one != IDENTITIES.for_authorization("realm", "Basic \xff")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_bound_token_is_its_client(scheme: str) -> None:
    identities = Identities(b"s" * 32, lambda: NOW)
    bind(identities, "abc", ALICE, "a/b", "c")
    alice = identities.for_authorization(REALM, ALICE)
    for name in ("a/b", "c"):
        assert identity_of(ClientCredential(f"{scheme} abc"), name=name, identities=identities) == alice
    for authorization in (f"{scheme} abd", "Basic abc", "abc", ""):
        assert identity_of(ClientCredential(authorization), identities=identities) != alice


def test_token_is_its_client_only_where_it_may_be_used() -> None:
    identities = Identities(b"s" * 32, lambda: NOW)
    bind(identities, "abc", ALICE, "a/b")
    alice = identities.for_authorization(REALM, ALICE)
    for name in ("a", "a/b/c", "a/c", "b"):
        identity = identity_of(ClientCredential("Bearer abc"), name=name, identities=identities)
        assert identity == identities.for_authorization(str(HUB), "Bearer abc") != alice


def test_token_that_has_ended_is_unknown() -> None:
    """It is not what it was before either, because upstream may have granted access to it then."""
    now = [NOW]
    identities = Identities(b"s" * 32, lambda: now[0])
    bind(identities, "abc", ALICE, "a/b", lifetime=60)
    before = [identity_of(ClientCredential("Bearer abc"), name=name, identities=identities) for name in ("a/b", "c")]
    now[0] += 59.9
    assert identity_of(ClientCredential("Bearer abc"), identities=identities) == before[0]
    now[0] += 0.1
    after = {identity_of(ClientCredential("Bearer abc"), name=name, identities=identities) for name in ("a/b", "c")}
    assert len(after) == 1 and not after & {*before, identities.for_authorization(str(HUB), "Bearer abc")}


def test_another_realm_cannot_confirm_a_password() -> None:
    """A hostile realm accepts every guess. Its tokens say nothing about the client of the honest realm."""
    identities = Identities(b"s" * 32, lambda: NOW)
    bind(identities, "honest", ALICE)
    bind(identities, "hostile", ALICE, issuer="https://evil.test/token")
    honest, hostile = (
        identity_of(ClientCredential(f"Bearer {token}"), identities=identities) for token in ("honest", "hostile")
    )
    assert honest != hostile


def test_bindings_are_shared_between_processes() -> None:
    published: list[Any] = []
    bindings = Bindings()
    bindings.subscribe(lambda *binding: published.append(binding))
    one = Identities(b"s" * 32, lambda: NOW, bindings)
    bind(one, "abc")
    others = Bindings()
    others.subscribe(lambda *binding: published.append(("again", binding)))
    others.add(*json.loads(json.dumps(published[0])))
    other = Identities(b"s" * 32, lambda: NOW, others)
    assert identity_of(ClientCredential("Bearer abc"), identities=other) == one.for_authorization(REALM, ALICE)
    assert len(published) == 1
    assert not any("abc" in str(value) or "bWU" in str(value) for value in published[0])


def test_bindings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BINDINGS", 3)
    identities = Identities(b"s" * 32, lambda: NOW)
    for number in range(5):
        bind(identities, str(number))
    me = identities.for_authorization(REALM, ALICE)
    bound = [identity_of(ClientCredential(f"Bearer {number}"), identities=identities) == me for number in range(5)]
    assert bound == [False, False, True, True, True]


def test_the_token_that_was_used_last_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BINDINGS", 2)
    identities = Identities(b"s" * 32, lambda: NOW)
    me = identities.for_authorization(REALM, ALICE)
    for token in ("a", "b", "a"):
        bind(identities, token)
    assert identity_of(ClientCredential("Bearer b"), identities=identities) == me
    bind(identities, "c")
    bound = [identity_of(ClientCredential(f"Bearer {token}"), identities=identities) == me for token in "abc"]
    assert bound == [False, True, True]


def test_a_hostile_realm_displaces_no_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BINDINGS", 10)
    bindings = Bindings()
    identities = Identities(b"s" * 32, lambda: NOW, bindings)
    for number in range(4):
        bind(identities, f"honest {number}")
    for number in range(100):
        bind(identities, f"hostile {number}", f"Basic {number}", issuer="https://evil.test/token")
    me = identities.for_authorization(REALM, ALICE)
    for number in range(4):
        assert identity_of(ClientCredential(f"Bearer honest {number}"), identities=identities) == me
    assert len(bindings._by_token) == sum(map(len, bindings._groups.values())) == 10


def test_clients_without_a_login_displace_no_tokens_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can ask the same realm for a token for any repository."""
    monkeypatch.setattr(module, "_MAX_BINDINGS", 10)
    identities = Identities(b"s" * 32, lambda: NOW, Bindings())
    for number in range(4):
        bind(identities, f"honest {number}")
    for number in range(100):
        identities.bind_public(f"anonymous {number}", REALM, NOW + 300)
    me = identities.for_authorization(REALM, ALICE)
    for number in range(4):
        assert identity_of(ClientCredential(f"Bearer honest {number}"), identities=identities) == me


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz"), st.booleans())))
def test_any_bindings_stay_bounded(steps: list[tuple[str, str, bool]]) -> None:
    bindings = Bindings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_BINDINGS", 4)
        for token, realm, is_read in steps:
            if is_read:
                bindings.get(token)
            else:
                bindings.add(token, realm, "own:x", [], NOW)
                assert bindings.get(token) == Binding(realm, "own:x", frozenset(), NOW)
            tokens = [token for tokens in bindings._groups.values() for token in tokens]
            assert len(tokens) <= 4 and set(tokens) == set(bindings._by_token)


@pytest.mark.parametrize("identity", [PUBLIC, "own:0123"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
@pytest.mark.parametrize("names", [frozenset(), frozenset({parse_repository("a/b"), parse_repository("c")})])
def test_local_token(identity: str, scheme: str, names: frozenset[Repository]) -> None:
    now = [NOW]
    identities = Identities(b"s" * 32, lambda: now[0])
    token = identities.issue_token(identity, names)
    assert identities.read_token(f"{scheme} {token}") == LocalToken(identity, names)
    assert IDENTITIES.read_token(f"{scheme} {token}") == LocalToken(identity, names)  # after a restart
    now[0] += TOKEN_LIFETIME - 1
    assert identities.read_token(f"{scheme} {token}") == LocalToken(identity, names)
    now[0] += 1
    assert identities.read_token(f"{scheme} {token}") == INVALID_TOKEN


@pytest.mark.parametrize("authorization", ["Basic drp.x", "Bearer abc", "Bearer", "", "Bearer xdrp.", "drp.x"])
def test_foreign_token(authorization: str) -> None:
    assert IDENTITIES.read_token(authorization) is None


def test_token_with_another_secret() -> None:
    assert IDENTITIES.read_token(f"Bearer {Identities(b't' * 32, lambda: NOW).issue_token(PUBLIC)}") == INVALID_TOKEN


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_altered_token(position: int, mask: int) -> None:
    signed = bytearray(urlsafe_b64decode(IDENTITIES.issue_token("own:0123").removeprefix("drp.")))
    signed[position % len(signed)] ^= mask
    assert IDENTITIES.read_token(f"Bearer drp.{urlsafe_b64encode(bytes(signed)).decode()}") == INVALID_TOKEN


@given(st.one_of(st.text(), st.binary().map(lambda data: urlsafe_b64encode(data).decode())))
def test_forged_token(text: str) -> None:
    assert IDENTITIES.read_token(f"Bearer drp.{text}") in (INVALID_TOKEN, None)


def test_identity_hash_is_not_a_token_signature() -> None:
    """The same secret is used for identities, but their hashes must not be valid signatures of tokens."""
    payload = f"own:0123\n{int(NOW) + TOKEN_LIFETIME}\n".encode()
    plain = hmac.new(b"s" * 32, payload, "sha256").digest()
    assert IDENTITIES.read_token(f"Bearer drp.{urlsafe_b64encode(payload + plain).decode()}") == INVALID_TOKEN


def test_signatures_are_compared_in_constant_time() -> None:
    assert "hmac.compare_digest" in inspect.getsource(Identities.read_token)


def test_secret_is_persistent(tmp_path: Path) -> None:
    path = tmp_path / "secret"

    def identities() -> Identities:
        staging = Staging(str(tmp_path / "staging"), private=True)
        return Identities(load_or_create_secret(path, staging), lambda: NOW)

    token = identities().issue_token(PUBLIC)
    assert path.stat().st_mode & 0o777 == 0o600
    assert identities().read_token(f"Bearer {token}") == LocalToken(PUBLIC)
    path.write_bytes(b"")  # a crash during its creation
    assert identities().read_token(f"Bearer {token}") == INVALID_TOKEN
    assert len(path.read_bytes()) == 32 and path.stat().st_mode & 0o777 == 0o600
