"""A fleet of daemons gets each blob from upstream once, if one of them dies, too, and keeps private content private."""

from __future__ import annotations

import http.client
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.fake_registry import throttled
from tests.e2e.harness.fleet import MemberDaemon, pull_blob, pulls, running_fleet, upstream_bytes
from tests.e2e.harness.http_client import (
    BufferedResponse,
    basic_authorization,
    read_response,
    request_directly,
    send_raw,
)
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import BASIC, FAKE, Upstreams

pytestmark = pytest.mark.slow

MIB = 1 << 20


def _received(member: TwistdDaemon, digest: str) -> int:
    """Return the bytes of the blob that `member` has written to its disk so far."""
    files = (member.state_folder / "cache").rglob(f"*{digest.partition(':')[2]}*")
    return sum(file.stat().st_size for file in files if file.is_file())


def request_from(address: str, member: MemberDaemon, path: str, headers: Mapping[str, str]) -> BufferedResponse:
    """Send a request to `member` from another address of this machine."""
    connection = http.client.HTTPConnection(member.name.partition(":")[0], member.port, source_address=(address, 0))
    try:
        connection.request("GET", path, headers=dict(headers))
        return read_response(connection.getresponse())
    finally:
        connection.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_cold_blob_is_sent_once(upstreams: Upstreams, tmp_path: Path, workers: str) -> None:
    data = images.random_bytes(8 * MIB, f"fleet, cold, {workers}")
    digest = upstreams.fake.put_blob("fleet/cold", data)
    url = f"{FAKE}/v2/fleet/cold/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, throttled(20e6, MIB, gate))
    with running_fleet(tmp_path, upstreams, 4, WORKERS=workers) as fleet:
        with pulls([(member, url) for member in fleet.members for _ in range(5)]) as running:
            wait_until(lambda: upstreams.fake.find_requests("GET", digest), "upstream is asked")
            gate.set()
        assert {(one.result().digest, one.result().size) for one in running} == {(digest, len(data))}
        assert upstream_bytes(upstreams.fake, digest) == len(data)
        statuses = [entry.cache_status for member in fleet.members for entry in member.access_log()]
        assert statuses.count("PEER") == 3  # once for each member that is not the owner


def test_an_image_of_many_clients_is_one_counted_pull(upstreams: Upstreams, tmp_path: Path) -> None:
    """Registries count each GET of a manifest."""
    image = images.build_small_image("fleet-image")
    upstreams.fake.put("fleet/image", "1", image)
    url = f"{FAKE}/v2/fleet/image/manifests/1"
    with running_fleet(tmp_path, upstreams, 4) as fleet, ThreadPoolExecutor(16) as pool:
        tasks = [
            pool.submit(member.client.get, url, Accept=ACCEPT_MANIFESTS) for member in fleet.members for _ in range(4)
        ]
        assert {task.result().body for task in tasks} == {image.manifest.data}
        counted = upstreams.fake.find_requests("GET", "fleet/image/manifests")
        assert len(counted) == 1, [request.path for request in counted]
        for member in fleet.members:
            again = member.client.get(url, Accept=ACCEPT_MANIFESTS)
            assert again.body == image.manifest.data and again.cache_status in ("REVALIDATED", "JOINED")
        assert len(upstreams.fake.find_requests("GET", "fleet/image/manifests")) == 1


def test_the_owner_is_killed_in_the_middle(upstreams: Upstreams, tmp_path: Path) -> None:
    """The others resume by Range at the next in the order, which has the beginning."""
    data = images.random_bytes(8 * MIB, "fleet, killed")
    digest = upstreams.fake.put_blob("fleet/killed", data)
    url = f"{FAKE}/v2/fleet/killed/blobs/{digest}"
    upstreams.fake.add_rule("GET", digest, throttled(4e6))
    with running_fleet(tmp_path, upstreams, 4) as fleet:
        owner, *others = fleet.owner_first(digest)
        with pulls([(member, url) for member in others for _ in range(4)]) as running:
            wait_until(lambda: all(_received(member, digest) >= 3 * MIB for member in others), "they have a half")
            owner.kill()
        assert {(one.result().digest, one.result().attempts) for one in running} == {(digest, 1)}
        # The bytes in the owner's buffers are sent again.
        assert len(data) <= upstream_bytes(upstreams.fake, digest) <= 1.5 * len(data)
        assert len(upstreams.fake.find_requests("GET", digest)) == 2


def test_the_owner_is_stopped(upstreams: Upstreams, tmp_path: Path) -> None:
    """It accepts connections and sends nothing. FLEET_TIMEOUT is 2 s."""
    data = images.random_bytes(4 * MIB, "fleet, stopped")
    digest = upstreams.fake.put_blob("fleet/stopped", data)
    url = f"{FAKE}/v2/fleet/stopped/blobs/{digest}"
    with running_fleet(tmp_path, upstreams, 4) as fleet:
        owner, *others = fleet.owner_first(digest)
        owner.send_signal(signal.SIGSTOP)
        try:
            with pulls([(member, url) for member in others for _ in range(4)]) as running:
                pass
        finally:
            owner.send_signal(signal.SIGCONT)
        assert {(one.result().digest, one.result().attempts) for one in running} == {(digest, 1)}
        assert upstream_bytes(upstreams.fake, digest) == len(data)


def test_lists_that_contradict_each_other(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each member knows itself and the next. Nobody waits in a circle, and all bytes are right."""
    data = images.random_bytes(4 * MIB, "fleet, contradicting")
    digest = upstreams.fake.put_blob("fleet/split", data)
    url = f"{FAKE}/v2/fleet/split/blobs/{digest}"
    with running_fleet(tmp_path, upstreams, 4, [(0, 1), (1, 2), (2, 3), (3, 0)]) as fleet:
        with pulls([(member, url) for member in fleet.members for _ in range(4)]) as running:
            pass
        assert {(one.result().digest, one.result().attempts) for one in running} == {(digest, 1)}
        assert upstream_bytes(upstreams.fake, digest) <= 4 * len(data)


def test_members_that_own_each_others_content_do_not_wait_for_each_other(upstreams: Upstreams, tmp_path: Path) -> None:
    """Two members with lists in which the other one is the owner: possible only while lists differ."""
    data = images.random_bytes(MIB, "fleet, circle")
    digest = upstreams.fake.put_blob("fleet/circle", data)
    with running_fleet(tmp_path, upstreams, 3, [(0, 1, 2), (0, 1, 2), (0, 1, 2)]) as fleet:
        owner, second, third = fleet.owner_first(digest)
        owner.kill()  # the second and the third differ for a moment about the next one
        url = f"{FAKE}/v2/fleet/circle/blobs/{digest}"
        with pulls([(member, url) for member in (second, third) for _ in range(4)]) as running:
            pass
        assert {(one.result().digest, one.result().attempts) for one in running} == {(digest, 1)}
        assert upstream_bytes(upstreams.fake, digest) <= 2 * len(data)


def test_private_content_stays_private_at_every_member(upstreams: Upstreams, tmp_path: Path) -> None:
    image = images.build_small_image("fleet-private", size=300_000)
    upstreams.push_to_basic("fleet/private", "1", image)
    alice, stranger = upstreams.basic_authorization("alice"), basic_authorization("eve", "guess")
    with running_fleet(tmp_path, upstreams, 3) as fleet:
        blob = f"/v2/fleet/private/blobs/{image.layers[0].digest}"
        manifest = "/v2/fleet/private/manifests/1"
        for member in fleet.members:
            for path in (manifest, blob):
                response = member.client.get(BASIC + path, Authorization=alice, Accept=ACCEPT_MANIFESTS)
                assert response.status == 200, (member.name, path)
        statuses = [entry.cache_status for member in fleet.members for entry in member.access_log()]
        assert statuses.count("PEER") >= 2
        requests = sum("fleet/private/blobs" in line for line in upstreams.basic.output_text.splitlines())
        assert requests >= 1
        for member in fleet.members:
            posing = [f'docker-registry-proxy;from="{one.name}";login=configured;as=owner' for one in fleet.members]
            for field in ("", *posing):
                fields = {"CDN-Loop": field, "Accept": ACCEPT_MANIFESTS} if field else {"Accept": ACCEPT_MANIFESTS}
                for path in (manifest, blob):
                    assert member.client.request("GET", BASIC + path, fields).status == 401
                    refused = member.client.request("GET", BASIC + path, {**fields, "Authorization": stranger})
                    assert refused.status == 401
                    mirrored = request_directly("GET", f"{member.url}{path}?ns=basic.test", fields)
                    assert mirrored.status in (401, 404)
        # An address of a member gives no more rights: each is a client, too.
        address = fleet.members[0].name.partition(":")[0]
        for field in posing:
            response = request_from(address, fleet.members[1], f"{blob}?ns=basic.test", {"CDN-Loop": field})
            assert response.status in (401, 503)


def test_relays_send_a_blob_on(upstreams: Upstreams, tmp_path: Path) -> None:
    """With FLEET_FAN_OUT=1 each member sends the blob to one other. One of them is killed in the middle."""
    data = images.random_bytes(8 * MIB, "fleet, relays")
    digest = upstreams.fake.put_blob("fleet/relays", data)
    url = f"{FAKE}/v2/fleet/relays/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, throttled(20e6, 4 * MIB, gate))
    with running_fleet(tmp_path, upstreams, 5, FLEET_FAN_OUT="1") as fleet:
        owner, *others = fleet.owner_first(digest)
        with ExitStack() as stack:
            running = []
            for member in others:  # one after the other, so that the tree is known: a chain
                running += stack.enter_context(pulls([(member, url)]))
                wait_until(lambda member=member: _received(member, digest) >= 3 * MIB, "it has the first half")  # type: ignore[misc]
            assert sum(entry.client != "127.0.0.1" for entry in owner.access_log()) == 3  # each 307
            others[1].kill()
            gate.set()
            outcomes = [one.result() for one in running if one is not running[1]]
        assert {(one.digest, one.attempts) for one in outcomes} == {(digest, 1)}
        assert upstream_bytes(upstreams.fake, digest) == len(data)
        sent = [entry.size for entry in owner.access_log() if entry.status in (200, 206) and entry.size > MIB]
        assert 1 <= len(sent) <= 2  # the one after the killed relay may come to the owner


def test_a_new_owner_gets_the_blob_from_the_former_one(upstreams: Upstreams, tmp_path: Path) -> None:
    data = images.random_bytes(2 * MIB, "fleet, former")
    digest = upstreams.fake.put_blob("fleet/former", data)
    url = f"{FAKE}/v2/fleet/former/blobs/{digest}"
    with running_fleet(tmp_path, upstreams, 3) as fleet:
        new, former, third = fleet.owner_first(digest)
        new.stop()
        assert pull_blob(former, url).digest == digest
        new.start()
        assert pull_blob(new, url).digest == digest
        assert pull_blob(third, url).digest == digest
        assert upstream_bytes(upstreams.fake, digest) == len(data)


def test_a_member_that_stops_hands_on(upstreams: Upstreams, tmp_path: Path) -> None:
    """It ends what it sends, and the next requests go to the next member."""
    data = images.random_bytes(4 * MIB, "fleet, draining")
    digest = upstreams.fake.put_blob("fleet/draining", data)
    url = f"{FAKE}/v2/fleet/draining/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, throttled(20e6, 2 * MIB, gate))
    with running_fleet(tmp_path, upstreams, 3) as fleet:
        owner, second, third = fleet.owner_first(digest)
        with pulls([(second, url)]) as first:
            wait_until(lambda: _received(second, digest) >= MIB, "it has the beginning")
            owner.terminate()
            wait_until(lambda: "stop" in owner.output_text or not _accepts(owner), "the owner stops to listen")
            with pulls([(third, url)]) as later:
                gate.set()
        assert {one.result().digest for one in (*first, *later)} == {digest}
        assert {one.result().attempts for one in (*first, *later)} == {1}
        owner.stop()


def _accepts(member: TwistdDaemon) -> bool:
    try:
        return request_directly("GET", f"{member.url}/healthz").status == 200
    except OSError:
        return False


def test_parents_that_form_a_circle_refuse(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each is the other's proxy. A tunnel through both ends at once, with the reason."""
    first, second = (TwistdDaemon(tmp_path / name, {**upstreams.settings, "WORKERS": "1"}) for name in ("a", "b"))
    first.environment["UPSTREAM_PROXY"], second.environment["UPSTREAM_PROXY"] = second.url, first.url
    try:
        first.start()
        second.start()
        response = send_raw(
            first.port, b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: elsewhere.example:443\r\n\r\n"
        )
        assert response.startswith(b"HTTP/1.1 502 ")
        assert "form a circle (status 508)" in second.output_text
        assert first.output_text.count("CONNECT elsewhere.example:443") == 2  # of the client, and of the other one
    finally:
        first.stop()
        second.stop()


def test_the_administrators_login_serves_all_members(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each member has it, so that none sends it to another."""
    image = images.build_small_image("fleet-login", size=300_000)
    upstreams.push_to_basic("fleet/login", "1", image)
    login = f"basic.test|alice|{upstreams.users['alice']}"
    settings = {"AUTH_REGISTRIES": login, "AUTH_REGISTRY_DELIMITER": "|"}
    with running_fleet(tmp_path, upstreams, 3, **settings) as fleet:
        for path in ("manifests/1", f"blobs/{image.layers[0].digest}"):
            answers = [
                member.client.get(f"{BASIC}/v2/fleet/login/{path}", Accept=ACCEPT_MANIFESTS) for member in fleet.members
            ]
            assert {answer.status for answer in answers} == {200}
            assert [answer.cache_status for answer in answers].count("PEER") == 2
