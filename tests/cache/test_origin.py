from __future__ import annotations

import json

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.origin import Origin, is_refusal, refuse
from dockerproxy.errors import (
    RegistryError,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.oci.names import parse_repository
from dockerproxy.upstream.credentials import Anonymous
from tests.cache.stand_ins.reactor import Reactor
from tests.cache.stand_ins.upstream import Answer, refusal
from tests.cache.stand_ins.world import HUB, OTHER, result


def error(answer: Answer, unknown: str = "BLOB_UNKNOWN") -> RegistryError:
    found = result(Deferred.fromCoroutine(refuse(HUB, answer, unknown)), Reactor())
    assert isinstance(found, RegistryError)
    return found


def test_names_and_paths() -> None:
    origin = Origin(OTHER, parse_repository("a/b"), Anonymous())
    assert origin.key == "other.example:5000/a/b"
    assert origin.blob_path("sha256:x") == "/v2/a/b/blobs/sha256:x"
    assert origin.manifest_path("1") == "/v2/a/b/manifests/1"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 416, 451, 499])
def test_a_no_is_passed_on_as_it_is(status: int) -> None:
    found = error(refusal(status, x_more="1"))
    assert isinstance(found, UpstreamRefused) and not is_outage(found)
    assert (found.status, found.content) == (status, b'{"errors":[{"code":"UPSTREAM","message":"no"}]}')
    assert ("x-more", "1") in found.headers
    assert is_refusal(found) == (status in (401, 403))


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "UNAUTHORIZED"), (403, "DENIED"), (404, "BLOB_UNKNOWN"), (405, "UNSUPPORTED"), (418, "UNKNOWN")],
)
def test_a_no_without_words(status: int, code: str) -> None:
    """To a HEAD; the client may have asked by GET, and expects some."""
    found = error(
        Answer(status, b"", {"content-type": "text/html", "www-authenticate": "Basic", "x-more": "1"}, length=99)
    )
    assert isinstance(found, UpstreamRefused)
    assert json.loads(found.content)["errors"][0] == {
        "code": code,
        "message": f"registry-1.docker.io answered {status}",
    }
    fields = dict(found.headers)
    assert fields["content-type"] == "application/json"
    assert (fields["www-authenticate"], fields["x-more"]) == ("Basic", "1")


def test_a_no_with_too_many_words() -> None:
    with pytest.raises(UpstreamBroken):
        error(Answer(403, b"x" * 100_000))


@pytest.mark.parametrize(("status", "told"), [(429, 429), (500, 502), (502, 502), (503, 502), (599, 502), (304, 502)])
def test_what_is_no_answer(status: int, told: int) -> None:
    answer = Answer(status, b"x", {"retry-after": "5", "ratelimit-remaining": "0;w=1", "x-more": "1"}, sent=0)
    found = error(answer)
    assert isinstance(found, UpstreamFailing) and is_outage(found) and not is_refusal(found)
    assert (found.status, dict(found.headers)) == (told, {"retry-after": "5", "ratelimit-remaining": "0;w=1"})
    assert answer.aborted


def test_what_the_token_server_says() -> None:
    assert is_refusal(Unauthorized("no token"))
    assert not is_refusal(TooManyRequests("of tokens"))
