"""Fixtures of the end-to-end tests: real upstreams and clients, and the daemon between them as a process of its own.

The upstreams run for the whole session and are shared: a test gives what it puts there names of its own. Daemons come
in two sizes: `proxy` is shared by a module, `run_proxy` makes one with other settings for one test. After each test
the logs of all of them are searched for tracebacks and secrets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.machines import Machines, Running
from tests.e2e.house.upstreams import Upstreams

_proxies: list[Proxy] = []


@pytest.fixture(scope="session")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    upstreams = Upstreams(tmp_path_factory.mktemp("upstreams"))
    upstreams.start()
    yield upstreams
    upstreams.stop()


@pytest.fixture(autouse=True)
def _sound_logs(upstreams: Upstreams) -> Iterator[None]:
    """No daemon may crash or tell a secret, whatever the test is about."""
    upstreams.fake.behave()
    yield
    for proxy in _proxies:
        proxy.check_log(upstreams.secrets)


@pytest.fixture(scope="module")
def proxy(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A daemon with default settings that knows the upstreams."""
    proxy = Proxy(tmp_path_factory.mktemp("proxy"), upstreams.settings)
    _proxies.append(proxy)
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy
    _proxies.remove(proxy)


@pytest.fixture
def run_proxy(upstreams: Upstreams, tmp_path: Path) -> Iterator[RunProxy]:
    """Return a function that starts a daemon with the given settings beside those of `proxy`."""
    running = Running()

    def run(name: str = "proxy", **settings: str) -> Proxy:
        proxy = Proxy(tmp_path / name, {**upstreams.settings, **settings})
        running.add(proxy)
        _proxies.append(proxy)
        proxy.start()
        return proxy

    yield run
    running.stop()
    for proxy in [process for process in running.processes if isinstance(process, Proxy)]:
        proxy.check_log(upstreams.secrets)
        _proxies.remove(proxy)


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("m"))
    yield machines
    machines.stop()
