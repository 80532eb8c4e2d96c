"""Docker's configuration file as a source of logins."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.credentials import BasicCredentials, IdentityToken
from dockerproxy.oci.docker_hub import DOCKER_HUB
from dockerproxy.oci.host_table import Wildcard
from dockerproxy.oci.names import Host
from dockerproxy.upstream.docker_config import DockerConfig

QUAY = Host.parse("quay.io")
ALICE = BasicCredentials("alice", "wonder:land")


def auth(text: str = "alice:wonder:land") -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def parse(**document: Any) -> DockerConfig:
    return DockerConfig.parse(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (auth(), ALICE),
        ({"username": "alice", "password": "wonder:land"}, ALICE),
        ({**auth(), "username": "bob", "password": "x", "email": "a@b"}, ALICE),  # docker takes auth
        ({**auth("<token>:"), "identitytoken": "t"}, IdentityToken("t")),
        (auth("alice:wonder:land\0\0"), ALICE),
        (auth(":secret"), BasicCredentials("", "secret")),
        ({}, None),  # a helper has it
        ({"auth": "", "username": None}, None),
        ({"email": "a@b"}, None),
    ],
)
def test_auths(entry: dict[str, Any], expected: Any) -> None:
    config = parse(auths={"quay.io": entry}, HttpHeaders={"x": "y"}, currentContext="default")
    assert config.logins == ({} if expected is None else {QUAY: expected})
    assert "wonder" not in repr(config)


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("quay.io", "quay.io"),
        ("https://quay.io", "quay.io"),
        ("https://quay.io/v2/", "quay.io"),
        ("https://quay.io/v1", "quay.io"),
        ("http://registry.test:5000/v2/", "registry.test:5000"),
        ("http://registry.test", "registry.test:80"),
        ("registry.test:5000", "registry.test:5000"),
        ("https://index.docker.io/v1/", "registry-1.docker.io"),
        ("docker.io", "registry-1.docker.io"),
        ("auth.docker.io", "registry-1.docker.io"),
    ],
)
def test_keys(key: str, host: str) -> None:
    config = parse(auths={key: auth()}, credHelpers={key: "test"})
    assert config.logins == {Host.parse(host): ALICE}
    assert config.helpers == {Host.parse(host): "test"}
    assert config.warnings == ()


@pytest.mark.parametrize("key", ["quay.io/org", "quay.io/org/app", "https://quay.io/org", "https://quay.io/v2/org"])
def test_a_key_of_a_part_of_a_registry_is_told_and_not_used(key: str) -> None:
    """Its login must not be shown for the rest of the registry."""
    config = parse(auths={key: auth()})
    assert (config.logins, len(config.warnings)) == ({}, 1)
    assert key in config.warnings[0]


@pytest.mark.parametrize("key", ["", "a b", "quay.io:99999", "x@y", "*", "https://"])
def test_a_key_that_is_no_registry_is_told(key: str) -> None:
    config = parse(auths={key: auth()}, credHelpers={key: "test"})
    assert (config.logins, config.helpers, len(config.warnings)) == ({}, {}, 2)


def test_the_newer_form_of_a_key_wins() -> None:
    for keys in (("quay.io", "https://quay.io/v2/"), ("https://quay.io/v2/", "quay.io")):
        config = parse(auths={key: auth() if key == "quay.io" else auth("old:x") for key in keys})
        assert config.logins == {QUAY: ALICE}


def test_helpers() -> None:
    config = parse(credsStore="pass", credHelpers={"*.pkg.dev": "gcloud"}, auths={"quay.io": {}})
    assert (config.default_helper, config.helpers) == ("pass", {Wildcard("pkg.dev"): "gcloud"})
    assert parse(credsStore="").default_helper is None
    assert DockerConfig.parse(b"{}") == DockerConfig()
    assert DOCKER_HUB.host not in config.logins


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"\xff", b'{"auths": []}', b'{"auths": {"quay.io": 1}}', b'{"credHelpers": "x"}',
        b'{"credHelpers": {"quay.io": 1}}', b'{"credHelpers": {"quay.io": "../x"}}', b'{"credsStore": "a/b"}',
        b'{"credsStore": 7}', b'{"auths": {"quay.io": {"auth": "!"}}}', b'{"auths": {"quay.io": {"auth": "YQ=="}}}',
        b'{"auths": {"quay.io": {"auth": 1}}}', b'{"auths": {"quay.io": {"username": "a", "password": "secret\\n"}}}',
        b'{"auths": {"quay.io": {"username": "a:secret", "password": "x"}}}', b'{"auths": {}, "auths": {}}',
        b'{"auths": {"quay.io": {"username": "secret"}}}',
    ],
)  # fmt: skip
def test_errors_are_sentences_without_the_secret(content: bytes) -> None:
    with pytest.raises(ValueError) as excinfo:
        DockerConfig.parse(content)
    assert "secret" not in str(excinfo.value)
    assert len(str(excinfo.value)) > 10


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["auths", "credHelpers", "credsStore", "quay.io", "auth", "username", "password"]),
            children,
            max_size=4,
        )
    ),
)


@given(json_values)
def test_any_json(value: Any) -> None:
    try:
        DockerConfig.parse(json.dumps(value).encode())
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("entry", [{"auth": "dTpw"}, {"auth": "!"}, {"username": "u:v", "password": "p"}, 1])
def test_a_login_in_a_key_is_not_logged(entry: Any) -> None:
    """Messages about the file go to the log."""
    for key in ("https://user:hunter2@quay.io/v2/", "user:hunter2@quay.io", "https://user:hunter2@quay.io/org"):
        try:
            text = " ".join(DockerConfig.parse(json.dumps({"auths": {key: entry}}).encode()).warnings)
        except ValueError as error:
            text = str(error)
        assert "hunter2" not in text and "quay.io" in text
