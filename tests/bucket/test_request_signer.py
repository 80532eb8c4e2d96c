"""Tests for the signatures of requests to an object store."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

pytest.importorskip("botocore", reason="botocore is optional, for REGISTRY_STORE only")

from botocore.credentials import RefreshableCredentials
from botocore.exceptions import CredentialRetrievalError

from dockerproxy.bucket.request_signer import UNSIGNED, NoCredentials, RequestSigner
from dockerproxy.errors import StoreRefused
from tests.store.support.reactor import SteppedReactor

KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "secret"}
URL = "http://store.test:9000/images/a%21b?list-type=2&prefix=a%2Fb"


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def sign(signer: RequestSigner, reactor: SteppedReactor, payload_hash: str = UNSIGNED) -> dict[str, str]:
    fields = reactor.run(signer.sign("PUT", URL, [("If-None-Match", "*")], payload_hash))
    return {name.lower(): value for name, value in fields}


def test_a_signed_request() -> None:
    reactor = SteppedReactor()
    signer = RequestSigner.find_credentials(reactor, "eu-1", KEYS)
    payload_hash = hashlib.sha256(b"x").hexdigest()
    fields = sign(signer, reactor, payload_hash)
    assert fields["if-none-match"] == "*"
    assert fields["x-amz-content-sha256"] == payload_hash
    assert fields["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKID/")
    assert (
        "/eu-1/s3/aws4_request, SignedHeaders=host;if-none-match;x-amz-content-sha256;x-amz-date"
        in (fields["authorization"])
    )
    assert sign(signer, reactor)["x-amz-content-sha256"] == UNSIGNED


def test_a_file_of_credentials(tmp_path: Any) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = FILED\naws_secret_access_key = s\n")
    reactor = SteppedReactor()
    assert "Credential=FILED/" in sign(RequestSigner.find_credentials(reactor, "eu-1", {}), reactor)["authorization"]


def test_no_credentials() -> None:
    with pytest.raises(NoCredentials, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        RequestSigner.find_credentials(SteppedReactor(), "eu-1", {})


def test_half_a_credential() -> None:
    with pytest.raises(NoCredentials, match="botocore cannot read"):
        RequestSigner.find_credentials(SteppedReactor(), "eu-1", {"AWS_ACCESS_KEY_ID": "AKID"})


def test_credentials_are_refreshed_in_a_thread() -> None:
    reactor, made = SteppedReactor(), []

    def refresh() -> dict[str, str]:
        made.append(1)
        lifetime = timedelta(hours=1) if len(made) > 1 else timedelta(seconds=1)
        return {
            "access_key": f"KEY{len(made)}",
            "secret_key": "s",
            "token": "t",
            "expiry_time": (datetime.now(UTC) + lifetime).isoformat(),
        }

    credentials = RefreshableCredentials.create_from_metadata(refresh(), refresh, "test")
    signer = RequestSigner(reactor, "eu-1", credentials, lambda: credentials)
    for _ in range(3):
        fields = sign(signer, reactor)
        assert "Credential=KEY2/" in fields["authorization"]
        assert fields["x-amz-security-token"] == "t"
    assert len(made) == 2


def test_credentials_that_cannot_be_refreshed() -> None:
    reactor = SteppedReactor()

    class Failing:
        def get_frozen_credentials(self) -> None:
            raise CredentialRetrievalError(provider="iam-role", error_msg="no answer")

    with pytest.raises(StoreRefused, match=r"cannot be refreshed: .*no answer"):
        sign(RequestSigner(reactor, "eu-1", Failing(), lambda: None), reactor)


def write_credentials(path: Any, key: str) -> None:
    (path / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n"
    )


def test_a_file_of_credentials_is_read_again_if_the_store_refuses_them(tmp_path: Any) -> None:
    write_credentials(tmp_path, "FIRST")
    reactor = SteppedReactor()
    signer = RequestSigner.find_credentials(reactor, "eu-1", {})
    assert "Credential=FIRST/" in sign(signer, reactor)["authorization"]
    assert not reactor.run(signer.renew(0)), "the file is as it was"
    write_credentials(tmp_path, "SECOND")
    assert not reactor.run(signer.renew(0)), "the file is not read for each request"
    reactor.advance(10)
    assert reactor.run(signer.renew(0))
    assert reactor.run(signer.renew(0)), "one that was signed before the file was read"
    assert not reactor.run(signer.renew(1))
    assert "Credential=SECOND/" in sign(signer, reactor)["authorization"]


@pytest.mark.parametrize("content", [None, "[default]\naws_access_key_id = HALF\n", "torn ["])
def test_a_file_that_is_being_written_changes_nothing(tmp_path: Any, content: str | None) -> None:
    write_credentials(tmp_path, "FIRST")
    reactor = SteppedReactor()
    signer = RequestSigner.find_credentials(reactor, "eu-1", {})
    sign(signer, reactor)
    (tmp_path / "credentials").unlink()
    if content is not None:
        (tmp_path / "credentials").write_text(content)
    assert not reactor.run(signer.renew(0))
    assert "Credential=FIRST/" in sign(signer, reactor)["authorization"]
