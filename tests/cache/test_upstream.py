from __future__ import annotations

import json

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.upstream import UpstreamRepository, error_from_response, is_denial
from dockerproxy.errors import (
    RegistryError,
    TooManyRequests,
    Unauthorized,
    UpstreamFailing,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import parse_repository
from dockerproxy.upstream.credentials import Anonymous
from tests.cache.support.harness import HUB, OTHER, result
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import ScriptedResponse, error_response


def error_for(response: ScriptedResponse, unknown: str = "BLOB_UNKNOWN") -> RegistryError:
    result_error = result(Deferred.fromCoroutine(error_from_response(HUB, response, unknown)), ManualReactor())
    assert isinstance(result_error, RegistryError)
    return result_error


def test_names_and_paths() -> None:
    repository = UpstreamRepository(OTHER, parse_repository("a/b"), Anonymous())
    assert repository.key == "other.example:5000/a/b"
    assert repository.blob_request("GET", "sha256:x").path == "/v2/a/b/blobs/sha256:x"
    assert repository.manifest_request("GET", "1", Headers()).path == "/v2/a/b/manifests/1"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 416, 451, 499])
def test_client_error_is_passed_through(status: int) -> None:
    mapped_error = error_for(error_response(status, x_more="1"))
    assert isinstance(mapped_error, UpstreamRefused) and not is_outage(mapped_error)
    assert (mapped_error.status, mapped_error.content) == (status, b'{"errors":[{"code":"UPSTREAM","message":"no"}]}')
    assert ("x-more", "1") in mapped_error.headers
    assert is_denial(mapped_error, PUBLIC) == (status in (401, 403))


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "UNAUTHORIZED"), (403, "DENIED"), (404, "BLOB_UNKNOWN"), (405, "UNSUPPORTED"), (418, "UNKNOWN")],
)
def test_error_without_body(status: int, code: str) -> None:
    """Upstream sends no body in response to HEAD, but the client may have sent GET, which expects one."""
    mapped_error = error_for(
        ScriptedResponse(
            status, b"", {"content-type": "text/html", "www-authenticate": "Basic", "x-more": "1"}, length=99
        )
    )
    assert isinstance(mapped_error, UpstreamRefused)
    assert json.loads(mapped_error.content)["errors"][0] == {
        "code": code,
        "message": f"registry-1.docker.io answered {status}",
    }
    fields = dict(mapped_error.headers)
    assert fields["content-type"] == "application/json"
    assert (fields["www-authenticate"], fields["x-more"]) == ("Basic", "1")


def test_error_body_too_large() -> None:
    """The status alone is the registry's word, so that no body turns a refusal into an outage."""
    for response in (ScriptedResponse(403, b"x" * 100_000), ScriptedResponse(403, b"{", length=100, sent=1)):
        if not response.ended:
            response.disconnect()
        mapped_error = error_for(response)
        assert is_denial(mapped_error, PUBLIC) and not is_outage(mapped_error)
        assert json.loads(mapped_error.content)["errors"][0]["code"] == "DENIED"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "expected_status"), [(429, 429), (500, 502), (502, 502), (503, 502), (599, 502), (304, 502)]
)
def test_outage_statuses(status: int, expected_status: int) -> None:
    response = ScriptedResponse(
        status, b"x", {"retry-after": "5", "ratelimit-remaining": "0;w=1", "x-more": "1"}, sent=0
    )
    mapped_error = error_for(response)
    assert isinstance(mapped_error, UpstreamFailing) and is_outage(mapped_error) and not is_denial(mapped_error, PUBLIC)
    assert (mapped_error.status, dict(mapped_error.headers)) == (
        expected_status,
        {"retry-after": "5", "ratelimit-remaining": "0;w=1"},
    )
    assert response.aborted


def test_token_server_errors() -> None:
    assert is_denial(Unauthorized("no token"), PUBLIC)
    assert not is_denial(TooManyRequests("of tokens"), PUBLIC)
