"""A fleet of daemons gets each blob from upstream once, if one of them dies, too, and keeps private content private."""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest

from dockerproxy.fleet.members import blob_key, ordered
from tests.e2e.harness import images
from tests.e2e.harness.clients import Skopeo
from tests.e2e.harness.daemon import AccessLogEntry, TwistdDaemon
from tests.e2e.harness.fake_registry import throttled
from tests.e2e.harness.fleet import (
    DaemonFleet,
    MemberDaemon,
    hop_fields,
    pull_blob,
    pulls,
    running_fleet,
    upstream_bytes,
)
from tests.e2e.harness.http_client import (
    BufferedResponse,
    basic_authorization,
    read_response,
    request_directly,
    send_raw,
)
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.upstreams import BASIC, FAKE, HUB, TOKEN_URL, Upstreams

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


class HalfSent:
    """A blob of which upstream sends a half and waits, so that a test knows how much each member has.

    If `only_first`, it does so for the first request alone, and sends all to the others.
    """

    SIZE, HALF = 8 * MIB, 4 * MIB

    def __init__(self, upstreams: Upstreams, name: str, *, only_first: bool = False) -> None:
        self.fake = upstreams.fake
        self.digest = self.fake.put_blob(f"fleet/{name}", images.random_bytes(self.SIZE, f"fleet, {name}"))
        self.url = f"{FAKE}/v2/fleet/{name}/blobs/{self.digest}"
        self.gate = threading.Event()
        self.fake.add_rule("GET", self.digest, throttled(200e6, self.HALF, self.gate), 1 if only_first else None)

    def wait_until_half_is_at(self, members: Iterable[MemberDaemon]) -> None:
        """Wait until the members have all that upstream has sent, but the last bytes, which the owner may hold."""
        for member in members:
            wait_until(
                lambda member=member: _received(member, self.digest) >= self.HALF - MIB // 8,  # type: ignore[misc]
                f"{member.name} has the first half",
            )

    def go_on(self, requests: int) -> None:
        """Let upstream send the rest as soon as it has got so many requests in all."""
        wait_until(lambda: len(self.fake.find_requests("GET", self.digest)) >= requests, "upstream is asked again")
        self.gate.set()

    @property
    def copies(self) -> float:
        """The copies of the blob that upstream has sent."""
        return upstream_bytes(self.fake, self.digest) / self.SIZE


def test_the_owner_is_killed_in_the_middle(upstreams: Upstreams, tmp_path: Path) -> None:
    """The others resume by Range at the next in the order, which has the beginning."""
    blob = HalfSent(upstreams, "killed")
    with running_fleet(tmp_path, upstreams, 4) as fleet:
        owner, *others = fleet.owner_first(blob.digest)
        with pulls([(member, blob.url) for member in others for _ in range(4)]) as running:
            blob.wait_until_half_is_at(others)
            owner.kill()
            blob.go_on(2)
        assert {(one.result().digest, one.result().attempts) for one in running} == {(blob.digest, 1)}
        assert 1 <= blob.copies <= 1.05  # the bytes that the owner had not sent on yet are sent again
        assert len(upstreams.fake.find_requests("GET", blob.digest)) == 2


def test_the_next_in_the_order_may_have_nothing(upstreams: Upstreams, tmp_path: Path) -> None:
    """It begins anew then, once for all of them."""
    blob = HalfSent(upstreams, "killed-nothing-elsewhere")
    with running_fleet(tmp_path, upstreams, 4) as fleet:
        owner, _, *others = fleet.owner_first(blob.digest)
        with pulls([(member, blob.url) for member in others for _ in range(4)]) as running:
            blob.wait_until_half_is_at(others)
            owner.kill()
            blob.go_on(2)
        assert {(one.result().digest, one.result().attempts) for one in running} == {(blob.digest, 1)}
        assert blob.copies <= 1.51
        assert len(upstreams.fake.find_requests("GET", blob.digest)) == 2


@pytest.mark.parametrize("is_begun", [False, True], ids=["before", "in the middle"])
def test_the_owner_is_stopped(upstreams: Upstreams, tmp_path: Path, is_begun: bool) -> None:
    """It accepts connections and sends nothing. FLEET_TIMEOUT is 2 s."""
    blob = HalfSent(upstreams, f"stopped-{is_begun}".lower(), only_first=is_begun)
    with running_fleet(tmp_path, upstreams, 4) as fleet, ExitStack() as stack:
        owner, *others = fleet.owner_first(blob.digest)
        stack.callback(owner.send_signal, signal.SIGCONT)
        stack.callback(blob.gate.set)
        if not is_begun:
            owner.send_signal(signal.SIGSTOP)
            blob.gate.set()
        running = stack.enter_context(pulls([(member, blob.url) for member in others for _ in range(4)]))
        if is_begun:
            blob.wait_until_half_is_at(others)
            owner.send_signal(signal.SIGSTOP)
        outcomes = [one.result() for one in running]
        assert {(one.digest, one.attempts) for one in outcomes} == {(blob.digest, 1)}
        assert blob.copies <= 1.05


def test_the_owner_is_cut_off_from_upstream_in_the_middle(upstreams: Upstreams, tmp_path: Path) -> None:
    """The bytes of upstream do not come to the owner any more, and no member is told. The others leave it."""
    blob = HalfSent(upstreams, "owner-cut-off", only_first=True)
    with running_fleet(tmp_path, upstreams, 4) as fleet, ExitStack() as stack:
        _, *others = fleet.owner_first(blob.digest)
        stack.callback(blob.gate.set)
        running = stack.enter_context(pulls([(member, blob.url) for member in others for _ in range(4)]))
        assert {(one.result().digest, one.result().attempts) for one in running} == {(blob.digest, 1)}
        assert blob.copies <= 1.07


def test_an_owner_that_cannot_reach_upstream_is_no_outage(upstreams: Upstreams, tmp_path: Path) -> None:
    """Upstream's own word counts for the others, also about a tag. They leave the owner alone."""
    image = images.build_small_image("fleet-unreachable", size=300_000)
    upstreams.fake.put("fleet/unreachable", "1", image)
    path, layer = "/v2/fleet/unreachable/manifests/1", image.layers[0]
    key = "fake.test/fleet/unreachable"
    with running_fleet(tmp_path, upstreams, 3, cut_off=key) as fleet:
        owner, *others = fleet.owner_first(key)
        assert owner.client.get(FAKE + path, Accept=ACCEPT_MANIFESTS).status >= 500
        for member in others:
            answer = member.client.get(FAKE + path, Accept=ACCEPT_MANIFESTS)
            assert (answer.status, answer.body, answer.cache_status) == (200, image.manifest.data, "MISS")
            assert f"the member {owner.name} is not asked for a while: it said that upstream" in member.output_text
            assert pull_blob(member, f"{FAKE}/v2/fleet/unreachable/blobs/{layer.digest}").digest == layer.digest


def test_a_site_behind_another_one_costs_one_transfer_over_the_link(upstreams: Upstreams, tmp_path: Path) -> None:
    """The members of the second site have one of the first as their UPSTREAM_PROXY."""
    blob = HalfSent(upstreams, "two-sites")
    blob.gate.set()
    with running_fleet(tmp_path / "a", upstreams, 2) as first:
        parent = first.members[0]
        behind = {
            "UPSTREAM_PROXY": parent.url, "UPSTREAM_CA_FILE": str(parent.ca_file), "UPSTREAM_ADDRESSES": "",
        }  # fmt: skip
        with running_fleet(tmp_path / "b", upstreams, 2, **behind) as second:
            with pulls([(member, blob.url) for member in second.members for _ in range(4)]) as running:
                pass
            assert {one.result().digest for one in running} == {blob.digest}
            sent = [entry.size for entry in parent.access_log() if blob.digest in entry.target and entry.size > MIB]
            assert sum(sent) == blob.SIZE and blob.copies == 1


def test_an_image_of_twelve_layers_by_skopeo_is_pulled_once(upstreams: Upstreams, tmp_path: Path) -> None:
    """Eight clients at four members: each blob comes once, and the manifest is counted once."""
    image = images.build_small_image("fleet-skopeo", size=100_000, layers=12)
    upstreams.fake.put("fleet/skopeo", "1", image)
    with running_fleet(tmp_path, upstreams, 4) as fleet, ThreadPoolExecutor(8) as pool:
        clients = [
            Skopeo(tmp_path / f"skopeo{number}", member.client_environment)
            for number, member in enumerate([*fleet.members, *fleet.members])
        ]
        folders = list(pool.map(lambda client: client.pull("fake.test/fleet/skopeo:1"), clients))
        for folder in folders:
            assert (folder / "manifest.json").read_bytes() == image.manifest.data
        asked = Counter(request.path for request in upstreams.fake.find_requests("GET", "/v2/fleet/skopeo/"))
        assert sum("/manifests/" in path for path in asked.elements()) == 1, asked
        assert {path.rpartition("/")[2] for path in asked if "/blobs/" in path} == {blob.digest for blob in image.blobs}
        assert sum("/blobs/" in path for path in asked.elements()) == 13, asked


def test_a_reload_changes_the_list_under_load(upstreams: Upstreams, tmp_path: Path) -> None:
    """Downloads that are under way go on. A list without this daemon is refused, and nothing changes."""
    blob = HalfSent(upstreams, "reload")
    with running_fleet(tmp_path, upstreams, 3, WORKERS="2") as fleet, ExitStack() as stack:
        stack.callback(blob.gate.set)
        owner, second, third = fleet.owner_first(blob.digest)
        running = stack.enter_context(pulls([(member, blob.url) for member in fleet.members for _ in range(3)]))
        blob.wait_until_half_is_at(fleet.members)
        for member, listed, outcome in (
            (
                second,
                f"{third.name} {owner.name}",
                f"not reloaded, the settings are unchanged: FLEET does not have FLEET_ADDRESS, {second.name}",
            ),
            (second, f"{second.name} {third.name}", "reloaded: serving"),
            (third, f"{second.name} {third.name}", "reloaded: serving"),
        ):
            offset = member.log_offset()
            member.set_fleet(listed.split())
            member.send_signal(signal.SIGHUP)
            wait_until(lambda: outcome in member.output_text[offset:], outcome)  # noqa: B023
        blob.gate.set()
        assert {(one.result().digest, one.result().attempts) for one in running} == {(blob.digest, 1)}
        assert blob.copies == 1
        # Now the two are a fleet of their own.
        other = next(
            digest
            for number in range(100)
            if fleet.owner_first(digest := upstreams.fake.put_blob("fleet/reload", b"%d" % number))[0] is owner
        )
        for member in (second, third, second):
            assert pull_blob(member, f"{FAKE}/v2/fleet/reload/blobs/{other}").digest == other
        assert len(upstreams.fake.find_requests("GET", other)) == 1
        assert not any(other in entry.target for entry in owner.access_log())


def test_lists_that_contradict_each_other(upstreams: Upstreams, tmp_path: Path) -> None:
    """Each member knows itself and the next. Nobody waits in a circle, and all bytes are right."""
    neighbours = [(0, 1), (1, 2), (2, 3), (3, 0)]
    with running_fleet(tmp_path, upstreams, 4, neighbours) as fleet:
        names = [member.name for member in fleet.members]
        lists = [tuple(names[number] for number in numbers) for numbers in neighbours]
        for attempt in itertools.count():
            data = images.random_bytes(4 * MIB, f"fleet, contradicting {attempt}")
            digest = upstreams.fake.put_blob("fleet/split", data)
            # Each owner that a list names downloads the blob. Two are the fewest for these lists.
            if len({ordered(blob_key(digest), known)[0] for known in lists}) == 2:
                break
        url = f"{FAKE}/v2/fleet/split/blobs/{digest}"
        with pulls([(member, url) for member in fleet.members for _ in range(4)]) as running:
            pass
        assert {(one.result().digest, one.result().attempts) for one in running} == {(digest, 1)}
        assert upstream_bytes(upstreams.fake, digest) <= 2 * len(data)


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
            proven = hop_fields(tmp_path / "ca", field, fleet.members[1].name, blob)
            response = request_from(address, fleet.members[1], f"{blob}?ns=basic.test", proven)
            assert response.status in (401, 504)


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


def test_an_image_for_all_members_at_once(
    upstreams: Upstreams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Upstream sends one copy of each blob, and no member more than FLEET_FAN_OUT. FLEET_MEMBERS is their number."""
    number = int(os.environ.get("FLEET_MEMBERS", "10"))
    fan_out = 8 if number >= 50 else 2
    image = images.build_small_image("fleet-herd", size=4 * MIB, layers=2)
    upstreams.fake.put("fleet/herd", "1", image)
    upstreams.fake.add_rule("GET", "/v2/fleet/herd/blobs/", throttled(8e6))
    manifest = f"{FAKE}/v2/fleet/herd/manifests/1"
    settings = {"FLEET_FAN_OUT": str(fan_out), "FLEET_TIMEOUT": "30s"}  # a busy machine has no silent members
    launched = time.monotonic()
    with running_fleet(tmp_path, upstreams, number, **settings) as fleet, ThreadPoolExecutor(number) as pool:
        started = time.monotonic()

        def pull(member: MemberDaemon) -> float:
            assert member.client.get(manifest, Accept=ACCEPT_MANIFESTS).body == image.manifest.data
            for blob in image.blobs:
                outcome = pull_blob(member, f"{FAKE}/v2/fleet/herd/blobs/{blob.digest}")
                assert (outcome.digest, outcome.attempts) == (blob.digest, 1)
            return time.monotonic() - started

        seconds = list(pool.map(pull, fleet.members))
        manifests = upstreams.fake.find_requests("GET", "fleet/herd/manifests")
        copies = [upstream_bytes(upstreams.fake, blob.digest) / len(blob.data) for blob in image.blobs]
        logs = [member.access_log() for member in fleet.members]
        memory = [member.resident_bytes >> 20 for member in fleet.members]

    def sent(entries: Iterable[AccessLogEntry], blob: TypedContent) -> float:
        """Return the copies of the blob that a member has sent to others."""
        sizes = (one.size for one in entries if one.client != "127.0.0.1" and blob.digest in one.target)
        return sum(sizes) / len(blob.data)

    layers = [blob for blob in image.blobs if len(blob.data) > MIB]
    most = [max(sent(entries, blob) for entries in logs) for blob in layers]
    with capsys.disabled():
        upstream, peers = (", ".join(f"{one:.2f}" for one in numbers) for numbers in (copies, most))
        print(
            f"\n{number} members, FLEET_FAN_OUT={fan_out}: start {started - launched:.0f} s, {sum(memory)} MiB in all;"
            f"\n  the first has the image after {min(seconds):.1f} s, the last after {max(seconds):.1f} s;"
            f"\n  from upstream: {len(manifests)} manifest, {upstream} copies of the blobs;"
            f"\n  from one member at most: {peers} copies of the layers"
        )
    assert len(manifests) == 1 and copies == [1] * len(copies)
    assert len(layers) == 2 and max(most) <= fan_out + 0.01


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
    """It ends its transfers, and the next requests go to the next member."""
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


def _metric(member: TwistdDaemon, sample: str) -> int:
    """Return the value of a sample of /metrics. States are written there every second."""
    text = request_directly("GET", f"{member.url}/metrics").body.decode()
    return int(float(next(line for line in text.splitlines() if line.startswith(sample + " ")).rpartition(" ")[2]))


def test_metrics_have_the_bytes_between_members_and_their_states(upstreams: Upstreams, tmp_path: Path) -> None:
    data = images.random_bytes(3 * MIB, "fleet, metrics")
    digest = upstreams.fake.put_blob("fleet/metrics", data)
    url = f"{FAKE}/v2/fleet/metrics/blobs/{digest}"
    with running_fleet(tmp_path, upstreams, 3) as fleet:
        owner, second, third = fleet.owner_first(digest)
        for member in (owner, second, third, second):
            assert pull_blob(member, url).digest == digest
        sent, received = (f'dockerproxy_peer_bytes_total{{direction="{one}"}}' for one in ("sent", "received"))
        assert [_metric(member, received) for member in (owner, second, third)] == [0, len(data), len(data)]
        assert [_metric(member, sent) for member in (owner, second, third)] == [2 * len(data), 0, 0]
        up, down = 'dockerproxy_peers{state="up"}', 'dockerproxy_peers{state="down"}'

        def peers(member: TwistdDaemon) -> tuple[int, int]:
            return _metric(member, up), _metric(member, down)

        wait_until(lambda: {peers(member) for member in fleet.members} == {(2, 0)}, "all members are up")
        owner.kill()
        other = next(
            other
            for number in range(100)
            if fleet.owner_first(other := upstreams.fake.put_blob("fleet/metrics", b"%d" % number))[0] is owner
        )
        assert pull_blob(second, f"{FAKE}/v2/fleet/metrics/blobs/{other}").digest == other
        wait_until(lambda: peers(second) == (1, 1), "the second member knows that the owner is down")
        assert peers(third) == (2, 0)  # it has not asked


def test_a_members_answer_for_a_tag_is_never_fresh(upstreams: Upstreams, tmp_path: Path) -> None:
    """With ENABLE_MANIFEST_CACHE only the owner, which upstream has answered, serves a tag without asking."""
    image = images.build_small_image("fleet-fresh")
    upstreams.fake.put("fleet/fresh", "1", image)
    path = "/v2/fleet/fresh/manifests/1"
    settings = {"ENABLE_MANIFEST_CACHE": "true", "MANIFEST_CACHE_DEFAULT_TIME": "1h"}
    with running_fleet(tmp_path, upstreams, 3, **settings) as fleet:
        owner, *others = fleet.owner_first("fake.test/fleet/fresh")
        for member in (owner, *others):
            assert member.client.get(FAKE + path, Accept=ACCEPT_MANIFESTS).status == 200
        for _ in range(2):
            assert owner.client.get(FAKE + path, Accept=ACCEPT_MANIFESTS).cache_status == "HIT"
            for member in others:
                offset = owner.log_offset()
                answer = member.client.get(FAKE + path, Accept=ACCEPT_MANIFESTS)
                assert (answer.body, answer.cache_status) == (image.manifest.data, "REVALIDATED")
                wait_until(lambda offset=offset: owner.access_log(offset), "the owner is asked")  # type: ignore[misc]
        assert len(upstreams.fake.find_requests("GET", path)) == 1
        assert len(upstreams.fake.find_requests("HEAD", path)) == 0


def test_a_local_token_of_one_member_is_good_at_all(upstreams: Upstreams, tmp_path: Path) -> None:
    """During an outage of the token server a member issues tokens itself, which clients use at any member."""
    image = images.build_small_image("fleet-tokens", size=50_000)
    name = "fleet-token/app"
    upstreams.push_to_hub(name, "1", image, owners={"alice"})
    alice, bob = upstreams.basic_authorization("alice"), upstreams.basic_authorization("bob")
    query = f"?service=registry.docker.io&scope=repository:{name}:pull"
    url = f"{HUB}/v2/{name}/manifests/1"

    def token(member: MemberDaemon, login: str) -> str:
        response = member.client.get(TOKEN_URL + query, Authorization=login)
        assert response.status == 200, response
        return str(response.json["token"])

    with running_fleet(tmp_path, upstreams, 3) as fleet:
        for member in fleet.members:
            fields = {"Authorization": f"Bearer {token(member, alice)}", "Accept": ACCEPT_MANIFESTS}
            assert member.client.request("GET", url, fields).status == 200
            token(member, bob)
        with upstreams.stopped():
            wait_until(lambda: token(fleet.members[0], alice).startswith("drp."), "the member issues tokens itself")
            for issuer in fleet.members:
                for login, status in ((alice, 200), (bob, None)):
                    fields = {"Authorization": f"Bearer {token(issuer, login)}", "Accept": ACCEPT_MANIFESTS}
                    for member in fleet.members:
                        answer = member.client.request("GET", url, fields)
                        assert answer.status == status or (status is None and answer.status >= 400)
                        assert status is None or answer.body == image.manifest.data


def test_chaos(upstreams: Upstreams, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Members are killed and stopped all the time, and no cache has room for all blobs: no pull fails.

    A client whose member dies asks another one, as behind a balancer. FLEET_CHAOS is the time in seconds.
    """
    seconds = float(os.environ.get("FLEET_CHAOS", "10"))
    contents = [images.random_bytes(MIB, f"fleet, chaos {number}") for number in range(24)]
    digests = [upstreams.fake.put_blob("fleet/chaos", data) for data in contents]
    ended, random = threading.Event(), Random(seconds)
    counts = {"pulls": 0, "again": 0, "kills": 0, "stops": 0}
    with running_fleet(tmp_path, upstreams, 4, CACHE_MAX_SIZE="12m") as fleet:

        def pull_all(number: int) -> None:
            choice = Random(number)
            while not ended.is_set():
                digest = choice.choice(digests)
                url = f"{FAKE}/v2/fleet/chaos/blobs/{digest}"
                deadline = time.monotonic() + 60
                while True:
                    try:
                        pull = pull_blob(choice.choice(fleet.members), url)
                        if pull.size < MIB:  # `http.client` does not say that the connection has broken
                            raise ConnectionResetError
                        break
                    except (OSError, http.client.HTTPException):
                        assert time.monotonic() < deadline, f"{digest} did not come within 60 s"
                        counts["again"] += 1
                        ended.wait(0.1)
                assert pull.digest == digest
                counts["pulls"] += 1

        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(pull_all, number) for number in range(6)]
            try:
                end = time.monotonic() + seconds
                while time.monotonic() < end and not any(task.done() for task in running):
                    member = random.choice(fleet.members)
                    if random.random() < 0.6:
                        counts["kills"] += 1
                        member.kill()
                        ended.wait(random.random())
                        member.start()
                    else:
                        counts["stops"] += 1
                        member.send_signal(signal.SIGSTOP)
                        ended.wait(2.5)  # longer than FLEET_TIMEOUT
                        member.send_signal(signal.SIGCONT)
            finally:
                ended.set()
            for task in running:
                task.result()
        with capsys.disabled():
            print(f"\nchaos of {seconds:g} s: {counts}")
        assert counts["kills"] and counts["stops"] and counts["pulls"] > len(digests)


@contextmanager
def cut_off(member: MemberDaemon, others: Iterable[MemberDaemon]) -> Iterator[None]:
    """Drop all packets between `member` and `others`. Each of them still has its clients, and upstream."""
    address = member.name.partition(":")[0]
    other_addresses = [other.name.partition(":")[0] for other in others]
    pairs = [pair for other in other_addresses for pair in ((address, other), (other, address))]
    with ExitStack() as stack:
        for source, destination in pairs:
            rule = ["INPUT", "-s", source, "-d", destination, "-j", "DROP"]
            subprocess.run(["iptables", "-A", *rule], check=True)
            stack.callback(subprocess.run, ["iptables", "-D", *rule], check=True)
        yield


def _run_in_own_network(request: pytest.FixtureRequest, set_up: str = "true") -> bool:
    """Run the test once more in a network namespace, unless it is in one, because the packet filter is the machine's.

    `set_up` is a command for the shell that is run there before. Return whether the test was run there.
    """
    require_programs("iptables", root=True)
    if {name for _, name in socket.if_nameindex()} == {"lo"}:
        return False
    if subprocess.run(["unshare", "--net", "iptables", "-S"], capture_output=True).returncode:
        pytest.skip("network namespaces or iptables do not work here")
    shell = ["unshare", "--net", "--mount", "sh", "-c", f'ip link set lo up && {set_up} && exec "$@"', "sh"]
    argv = [*shell, sys.executable, "-m", "pytest", "-q"]
    completed = subprocess.run(
        [*argv, request.node.nodeid], cwd=request.config.rootpath, capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0 and "1 passed" in completed.stdout, completed.stdout
    return True


def test_the_owner_is_silently_cut_off_in_the_middle(
    request: pytest.FixtureRequest, upstreams: Upstreams, tmp_path: Path
) -> None:
    """Nobody is told that the packets are dropped. FLEET_TIMEOUT is 2 s."""
    if _run_in_own_network(request):
        return
    data = images.random_bytes(8 * MIB, "fleet, cut off")
    digest = upstreams.fake.put_blob("fleet/cut-off", data)
    url = f"{FAKE}/v2/fleet/cut-off/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, throttled(20e6, 4 * MIB, gate))
    with running_fleet(tmp_path, upstreams, 4) as fleet:
        owner, *others = fleet.owner_first(digest)
        with pulls([(member, url) for member in fleet.members for _ in range(3)]) as running:
            wait_until(lambda: all(_received(member, digest) >= 3 * MIB for member in others), "they have a part")
            with cut_off(owner, others):
                gate.set()
                outcomes = [one.result() for one in running]
        assert {(one.digest, one.attempts) for one in outcomes} == {(digest, 1)}
        assert upstream_bytes(upstreams.fake, digest) <= 2 * len(data)
        assert pull_blob(others[0], url).digest == digest


class NamedMember(MemberDaemon):
    """A member with an IPv6 address and the usual port, as a name can have. It is reached by clients as others are."""

    def __init__(self, folder: Path, number: int, settings: dict[str, str]) -> None:
        super().__init__(folder, number, settings)
        self.name = f"[fd00::{number}]:3128"
        listen = f"tcp:{self.port}:interface=127.0.0.1 tcp6:3128:interface=fd00\\:\\:{number}"
        self.environment |= {"PROXY_LISTEN": listen, "FLEET_ADDRESS": self.name}


def test_members_with_ipv6_addresses_that_a_name_has(
    request: pytest.FixtureRequest, upstreams: Upstreams, tmp_path: Path
) -> None:
    numbers = (1, 2, 3)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"fd00::{number} fleet.test\n" for number in numbers))
    addresses = " && ".join(f"ip -6 address add fd00::{number}/128 dev lo" for number in numbers)
    if _run_in_own_network(request, f"{addresses} && mount --bind {hosts} /etc/hosts"):
        return
    image = images.build_small_image("fleet-ipv6", size=300_000)
    upstreams.fake.put("fleet/ipv6", "1", image)
    blob = f"{FAKE}/v2/fleet/ipv6/blobs/{image.layers[0].digest}"
    settings = {**upstreams.settings, "CA_DIR": str(tmp_path / "ca"), "ALLOW_CLIENTS": "all", "FLEET_TIMEOUT": "20s"}
    members = [NamedMember(tmp_path / f"member{number}", number, settings) for number in numbers]
    with ExitStack() as stack:
        for member in members:
            stack.callback(member.stop)
            member.set_fleet(["fleet.test"])
            member.start()
            wait_until(lambda member=member: "the fleet has 3 members" in member.output_text, "it knows the others")  # type: ignore[misc]
        for member in members:
            answer = member.client.get(f"{FAKE}/v2/fleet/ipv6/manifests/1", Accept=ACCEPT_MANIFESTS)
            assert answer.body == image.manifest.data
            assert pull_blob(member, blob).digest == image.layers[0].digest
            member.check_log(upstreams.secrets)
        assert len(upstreams.fake.find_requests("GET", "/v2/fleet/ipv6/")) == 2  # the others were asked for the rest

        def peers() -> int:
            return sum(entry.cache_status == "PEER" for member in members for entry in member.access_log())

        wait_until(lambda: peers() == 4, "the log has two members for the blob in the clear, and two for the manifest")


def test_a_name_without_addresses_is_a_sentence_and_no_outage(upstreams: Upstreams, tmp_path: Path) -> None:
    digest = upstreams.fake.put_blob("fleet/nameless", b"nameless")
    member = MemberDaemon(tmp_path, 0, upstreams.settings)
    member.set_fleet(["no-such-name.invalid"])
    with member.run_and_check_log(lambda: upstreams.secrets):
        assert pull_blob(member, f"{FAKE}/v2/fleet/nameless/blobs/{digest}").digest == digest
        sentence = "FLEET: no-such-name.invalid cannot be looked up ("
        wait_until(lambda: sentence in member.output_text, "it says so")
        assert "this daemon serves alone until it can" in member.output_text


def test_a_member_with_another_ca_and_another_login(upstreams: Upstreams, tmp_path: Path) -> None:
    """Public blobs go on between them. The log names the difference, once."""
    image = images.build_small_image("fleet-differing", size=300_000)
    upstreams.push_to_basic("fleet/differing", "1", image)
    digest = upstreams.fake.put_blob("fleet/differing", images.random_bytes(300_000, "fleet, differing"))
    manifest = f"{BASIC}/v2/fleet/differing/manifests/1"
    login = {"AUTH_REGISTRIES": f"basic.test|alice|{upstreams.users['alice']}", "AUTH_REGISTRY_DELIMITER": "|"}
    common = {**upstreams.settings, "FLEET_TIMEOUT": "2s"}
    for name, other, sentence in (
        ("ca", {**login, "CA_DIR": str(tmp_path / "other")}, "CA_CRT_FILE and CA_KEY_FILE must be the same"),
        ("login", {"CA_DIR": str(tmp_path / "ca")}, "with a login for basic.test (AUTH_REGISTRIES), which this daemon"),
    ):
        first = MemberDaemon(tmp_path / name, 0, {**common, **login, "CA_DIR": str(tmp_path / "ca")})
        second = MemberDaemon(tmp_path / f"other-{name}", 1, {**common, **other})
        with ExitStack() as stack:
            for member in (first, second):
                member.set_fleet([first.name, second.name])
                stack.enter_context(member.run_and_check_log(lambda: upstreams.secrets))
            owner = DaemonFleet([first, second]).owner_first("basic.test/fleet/differing")[0]
            for _ in range(2):
                assert first.client.get(manifest, Accept=ACCEPT_MANIFESTS).body == image.manifest.data
            if owner is second:
                assert (first.output_text + second.output_text).count(sentence) == 1
            for member in (first, second):
                assert pull_blob(member, f"{FAKE}/v2/fleet/differing/blobs/{digest}").digest == digest


def test_a_blob_is_private_under_another_repositorys_name(upstreams: Upstreams, tmp_path: Path) -> None:
    """The stranger may read a repository of its own, or a public one, and knows the digest of alice's blob."""
    secret, other, public = (images.build_small_image(f"fleet-names-{number}", size=200_000) for number in range(3))
    upstreams.push_to_hub("fleet-names/alice", "1", secret, owners={"alice"})
    upstreams.push_to_hub("fleet-names/bob", "1", other, owners={"bob"})
    upstreams.push_to_hub("fleet-names/public", "1", public)
    digest = secret.layers[0].digest
    alice, bob = upstreams.basic_authorization("alice"), upstreams.basic_authorization("bob")

    def pull(member: MemberDaemon, name: str, login: str | None, digest: str, **fields: str) -> int:
        query = f"?service=registry.docker.io&scope=repository:{name}:pull"
        answer = member.client.request("GET", TOKEN_URL + query, {"Authorization": login} if login else {})
        headers = {"Authorization": f"Bearer {answer.json['token']}", **fields}
        return member.client.request("GET", f"{HUB}/v2/{name}/blobs/{digest}", headers).status

    with running_fleet(tmp_path, upstreams, 3) as fleet:
        for member in fleet.members:
            assert pull(member, "fleet-names/alice", alice, digest) == 200
            assert pull(member, "fleet-names/bob", bob, other.layers[0].digest) == 200
            assert pull(member, "fleet-names/public", None, public.layers[0].digest) == 200
        address = fleet.members[0].name.partition(":")[0]
        for member in fleet.members:
            for kind in ("owner", "relay", "last", "former"):
                hop = f'docker-registry-proxy;from="{fleet.members[0].name}";login=none;as={kind}'
                for name, login in (("bob", bob), ("public", None), ("alice", bob), ("alice", None)):
                    for fields in ({}, {"CDN-Loop": hop}):
                        # 504 for one that asks as a former owner would, from another address than its own.
                        refusals = {401, 403, 404} | ({504} if fields and kind == "former" else set())
                        assert pull(member, f"fleet-names/{name}", login, digest, **fields) in refusals
                    # Each machine of a member may have strangers, too.
                    path = f"/v2/fleet-names/{name}/blobs/{digest}?ns=docker.io"
                    proven = hop_fields(tmp_path / "ca", hop, member.name, path)
                    assert request_from(address, member, path, proven).status in (401, 403, 404, 504)
