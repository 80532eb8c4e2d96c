"""Fixtures of the end-to-end tests: real upstreams and clients, and the daemon between them in a process of its own.

The upstreams run for the whole session and are shared, so each test uses repository names of its own. The daemon of the
fixture `daemon` is shared by a module. `start_daemon` starts one with other settings for a single test. After each test
the logs of all daemons are searched for tracebacks and secrets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness.ceph_store import CephRGW
from tests.e2e.harness.client_factory import ClientFactory, ProcessGroup
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.object_store import ObjectStore
from tests.e2e.harness.seaweedfs import SeaweedFS
from tests.e2e.harness.upstreams import Upstreams

_daemons: list[TwistdDaemon] = []


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a short name, because the path of a socket below it may have 107 characters."""
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    upstreams = Upstreams(tmp_path_factory.mktemp("upstreams"))
    upstreams.start()
    yield upstreams
    upstreams.stop()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """Return an object store for all tests that do not stop it. Each makes buckets of its own."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")).run() as store:
        yield store


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephRGW]:
    """Return another one, of a kind that heeds fewer conditions; skip the test if it is not installed."""
    with CephRGW(tmp_path_factory.mktemp("ceph")).run() as store:
        yield store


@pytest.fixture(scope="module", params=["seaweedfs", "ceph"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Return each kind of object store in turn."""
    store: ObjectStore = request.getfixturevalue(request.param)
    return store


@pytest.fixture(autouse=True)
def _check_logs(upstreams: Upstreams) -> Iterator[None]:
    """Check after every test that no daemon's log has a traceback or a secret."""
    upstreams.fake.reset_rules()
    yield
    for daemon in _daemons:
        daemon.check_log(upstreams.secrets)


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwistdDaemon]:
    """Return a daemon with default settings, configured for the upstreams."""
    daemon = TwistdDaemon(tmp_path_factory.mktemp("daemon"), upstreams.settings)
    _daemons.append(daemon)
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        yield daemon
    _daemons.remove(daemon)


@pytest.fixture
def start_daemon(upstreams: Upstreams, tmp_path: Path) -> Iterator[StartDaemon]:
    """Return a function that starts a daemon with the given settings in addition to those of `daemon`."""
    group = ProcessGroup()

    def start_daemon(name: str = "daemon", **settings: str) -> TwistdDaemon:
        daemon = TwistdDaemon(tmp_path / name, {**upstreams.settings, **settings})
        group.add(daemon)
        _daemons.append(daemon)
        daemon.start()
        return daemon

    yield start_daemon
    group.stop()
    for daemon in [process for process in group.members if isinstance(process, TwistdDaemon)]:
        daemon.check_log(upstreams.secrets)
        _daemons.remove(daemon)


@pytest.fixture
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientFactory]:
    factory = ClientFactory(tmp_path_factory.mktemp("m"))
    yield factory
    factory.stop()
