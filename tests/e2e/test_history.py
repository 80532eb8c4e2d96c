"""`dockerproxy why` and `history`: each cause in the log is explained, and each pull of all processes is listed."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.fake_registry import respond_status
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.multi_process import WORKERS, MultiProcessDaemon, request_on
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams

MIB = 1 << 20
HEADERS = {"Accept": ACCEPT_MANIFESTS, "User-Agent": "docker/27 \xff" + "x" * 500}


@pytest.fixture
def daemon(upstreams: Upstreams, tmp_path: Path) -> Iterator[MultiProcessDaemon]:
    daemon = MultiProcessDaemon(tmp_path / "daemon", {**upstreams.settings, "CACHE_MAX_SIZE": "4m"})
    daemon.start()
    yield daemon
    daemon.stop()
    daemon.check_log(upstreams.secrets)


def run_json(daemon: MultiProcessDaemon, *arguments: str) -> dict[str, Any]:
    result = daemon.run_cli(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_each_cause_is_explained(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    name, fake = "why/app", upstreams.fake
    first, second = (images.build_small_image(f"why {number}", size=MIB) for number in (1, 2))
    layer = first.layers[0].digest
    url = f"{FAKE}/v2/{name}"

    def get_manifest(headers: dict[str, str] = HEADERS) -> None:
        assert daemon.client.request("GET", f"{url}/manifests/1", headers).status == 200

    fake.put(name, "1", first)
    get_manifest()  # new
    get_manifest()  # unchanged
    daemon.client.get(f"{url}/blobs/{layer}")  # new
    filler = fake.put_blob("why/filler", images.random_bytes(3 * MIB, "filler"))
    daemon.client.get(f"{FAKE}/v2/why/filler/blobs/{filler}")
    daemon.client.get(f"{url}/blobs/{layer}")  # evicted
    fake.put(name, "1", second)
    get_manifest()  # moved
    fake.add_rule("HEAD", f"/v2/{name}/manifests/1", respond_status(503))
    fake.add_rule("GET", f"/v2/{name}/manifests/1", respond_status(503))
    get_manifest()  # stale
    fake.reset_rules()
    assert daemon.client.get(f"{url}/manifests/none", Accept=ACCEPT_MANIFESTS).status == 404

    def is_logged() -> bool:
        return any(line.target.endswith("/manifests/none") for line in daemon.access_log())

    wait_until(is_logged, "the last request is in the log")
    logged = [line.because for line in daemon.access_log() if f"/{name}/" in line.target]
    daemon.restart()

    answer = run_json(daemon, "why", f"fake.test/{name}:1")
    causes = [row["because"] for row in reversed(answer["happened"])]
    assert sorted(causes) == sorted(filter(None, logged[:-1]))
    explanations = " ".join(row["explanation"] for row in answer["happened"])
    for text in (
        "it was never here before", "the tag has not moved", "the tag moved upstream, from sha256:",
        "to make room, last used", "so it is the last good response",
    ):  # fmt: skip
        assert text in explanations, text
    assert answer["pulls"] == {"days": 30, "pulls": 4, "hosts": 1}
    (tag,) = answer["tags"]
    assert (tag["digest"], "asked by HEAD" in tag["sentence"]) == (second.manifest.digest, True)
    assert answer["readers"]["public"] is True
    states = {content["digest"]: content["state"] for content in answer["contents"]}
    assert states[second.manifest.digest] == "here" and states[second.layers[0].digest] == "absent"
    text = daemon.run_cli("why", f"fake.test/{name}:1").stdout
    assert "4 pulls by 1 host in 30 days" in text and "readable by everybody: fake.test" in text
    assert "404" in {str(row["status"]) for row in run_json(daemon, "history", f"fake.test/{name}")["pulls"]}


@pytest.mark.parametrize(
    "name",
    ["fake.test/\x1b[31mred:v1", "fake.test/why/app:\x07", "fake.test/WHY:v1", "fake.test/why/app:" + "v" * 129],
    ids=["control-characters", "tag", "capitals", "long-tag"],
)
def test_names_of_nothing_are_refused(daemon: MultiProcessDaemon, name: str) -> None:
    for arguments in ([name], [name, "--json"]):
        result = daemon.run_cli("why", *arguments)
        assert (result.returncode, "\x1b" in result.stderr) == (2, False), result
        assert " is not a repository name" in result.stderr or " is not a tag" in result.stderr


def test_pulls_of_all_processes_are_listed(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    upstreams.fake.put("history/app", "1", images.build_small_image("history"))
    with daemon.connection_to_each_process(f"{FAKE}/") as connections:
        for connection in connections.values():
            response = request_on(connection, "GET", "/v2/history/app/manifests/1", headers=HEADERS)
            assert response.status == 200
    daemon.restart()
    document = run_json(daemon, "history", "fake.test/history/app:1")
    assert len(document["pulls"]) == WORKERS and document["more"] is False
    row = document["pulls"][0]
    assert (row["client"], row["pulls"], row["status"], row["reference"]) == ("127.0.0.1", 1, 200, "1")
    assert row["user_agent"].startswith("docker/27 ") and len(row["user_agent"]) == 256
    assert run_json(daemon, "history", "--client", "192.0.2.1")["pulls"] == []
    assert run_json(daemon, "history", "--since", "1h", "--client", "127.0.0.1")["pulls"]
    assert run_json(daemon, "history", "fake.test/history/app:2")["pulls"] == []
    assert run_json(daemon, "history", "a" * 900)["pulls"] == []
    assert re.search(r"fake.test/history/app:1 +MISS", daemon.run_cli("history").stdout)
    (listed,) = run_json(daemon, "ls", "fake.test/history/*")["repositories"]
    assert listed["pulls"] == WORKERS
    files = [daemon.state_folder / "history" / "pulls.jsonl", *(daemon.state_folder / "history").glob("pulls-*.json")]
    assert len(files) == 2 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    total, clients, public = json.loads(files[1].read_bytes())["repositories"]["fake.test/history/app"]
    assert (total, clients, public) == (WORKERS, ["127.0.0.1"], WORKERS), "everybody may read it, and see the number"
    upstreams.fake.put("history/app", "2", images.build_small_image("history"))
    unknown = daemon.run_cli("why", "no-such.example/app")
    assert (unknown.returncode, "no such repository" in unknown.stderr) == (4, True)
    assert "nothing is known of it" in daemon.run_cli("why", "fake.test/never/seen:1").stdout


def test_a_history_that_is_off_keeps_nothing(upstreams: Upstreams, tmp_path: Path) -> None:
    folder = tmp_path / "daemon/state/history"
    folder.mkdir(parents=True)
    (folder / "pulls.jsonl").write_text('{"journal":"pulls","version":1}\n')
    upstreams.fake.put("history/off", "1", images.build_small_image("history off"))
    daemon = MultiProcessDaemon(tmp_path / "daemon", {**upstreams.settings, "PULL_HISTORY": "off"})
    daemon.start()
    try:
        assert daemon.client.get(f"{FAKE}/v2/history/off/manifests/1", Accept=ACCEPT_MANIFESTS).status == 200
        daemon.restart()
        assert "no history is kept" in daemon.run_cli("history").stdout
        assert run_json(daemon, "why", "fake.test/history/off:1")["happened"] == []
    finally:
        daemon.stop()
    assert not list(folder.glob("pulls*"))
