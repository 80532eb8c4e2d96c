"""Runs each client directly, through the proxy with an empty cache, again, and with all registries stopped."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from attrs import define, field, frozen

from tests.clients.matrix_clients import MatrixClient, Network, Result
from tests.clients.upstream_set import PUSH_HOST, SOURCES, USER, Source, UpstreamSet, pushed_image, repository_name
from tests.e2e.harness.clients import Machine
from tests.e2e.harness.docker_registry import push_image
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.images import build_small_image
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, USERS, RegistryDaemon

DIRECT, COLD, WARM, OFF = "directly", "cold", "warm", "off"
HOSTED_PUSH, HOSTED_PULL, HOSTED_OFF = "push", "pull", "pull, off"
HOSTED, PUSH, ENGINE = "hosted", "push", "engine"
"""Columns beside those of the sources: the hosted registry, and a push to another registry (ALLOW_PUSH).

The last one has a failure of the client's engine to start.
"""

_NEEDS_TOKEN_SERVER = "token"
"""A token server that the proxy only tunnels to: it never sees the logins, so it cannot take the server's place."""
_SOURCES_WITH_TOKENS = ("hub-private", "token", "listed")
_PARALLEL_CLIENTS = 4
_UNREACHABLE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")


class Verdict(Enum):
    """The result of one step."""

    GOOD = "good"
    FAILED = "failed"
    DOWNLOADED_AGAIN = "downloaded again"
    """A pull of something cached that fetched blobs from upstream."""


@frozen
class Outcome:
    """The result of one step. `message` is the last line that the client wrote, if it failed."""

    verdict: Verdict
    message: str = ""


@define
class MatrixRow:
    """One client of one Debian release. `outcomes` has the results by column and step."""

    number: int
    client: type[MatrixClient]
    machine: Machine
    release: str
    version: str
    outcomes: dict[tuple[str, str], Outcome] = field(factory=dict)

    @property
    def slug(self) -> str:
        """Return a name that fits in a repository's name and in a path."""
        return re.sub("[^a-z0-9]+", "-", f"{self.client.__name__}-{self.release}".lower())

    @property
    def sources(self) -> tuple[Source, ...]:
        """The registries that the client pulls from. It has no login of its own for a mirror."""
        hosts = self.client.MIRRORED_HOSTS
        if self.client.ENGINE_GOES_DIRECTLY:
            return tuple(source for source in SOURCES if not source.shared_login)
        return tuple(
            source
            for source in SOURCES
            if not hosts or (source.host in hosts and (source.shared_login or not source.has_login))
        )

    @property
    def uses_proxy_only(self) -> bool:
        """True for a client whose every part uses the proxy as its proxy, and none as a mirror."""
        return not self.client.MIRRORED_HOSTS and not self.client.ENGINE_GOES_DIRECTLY

    def is_red(self, column: str, step: str) -> bool:
        """True if a step went wrong that the same client can do directly, or an engine did not start.

        A pull with all registries stopped counts if the client can pull directly while they run.
        """
        outcome = self.outcomes.get((column, step))
        if outcome is None or outcome.verdict is Verdict.GOOD or step == DIRECT:
            return False
        if self.needs_token_server(column, step):
            return False
        direct = self.outcomes.get((PUSH if column == HOSTED else column, DIRECT))
        return outcome.verdict is Verdict.DOWNLOADED_AGAIN or direct is None or direct.verdict is Verdict.GOOD

    def needs_token_server(self, column: str, step: str) -> bool:
        """True for a pull that cannot work, because the client needs a token of a server that is stopped."""
        fetches_token = self.client.FETCHES_TOKENS_BY_ITSELF and column in _SOURCES_WITH_TOKENS
        return step == OFF and (column == _NEEDS_TOKEN_SERVER or fetches_token)

    @property
    def red_steps(self) -> list[tuple[str, str]]:
        """The columns and steps for which `is_red` is true."""
        return [key for key in self.outcomes if self.is_red(*key)]


@frozen
class ClientMatrix:
    """The rows, with the servers between which they run. Files are in `folder`, which has a short path."""

    folder: Path
    upstreams: UpstreamSet
    daemon: RegistryDaemon
    report: Callable[[str], None]

    def run(self, rows: Iterable[MatrixRow]) -> None:
        """Fill in the outcomes of `rows`. Several clients run at a time."""
        rows = list(rows)
        with ThreadPoolExecutor(_PARALLEL_CLIENTS) as pool:
            list(pool.map(self._put_images, rows))
            list(pool.map(self._run_connected, rows))
            with self.upstreams.stopped():
                list(pool.map(self._run_off, rows))

    def _put_images(self, row: MatrixRow) -> None:
        self.upstreams.put_images(row.slug)
        hosted = _HostedEndpoint(HOSTED_REGISTRY_HOST, self.daemon.http_port)
        login = basic_authorization("alice", USERS["alice"])
        push_image(hosted, f"seeded/{row.slug}", "1", build_small_image(row.slug, oci=False), None, login)

    def _run_connected(self, row: MatrixRow) -> None:
        with self._client(row, DIRECT, self._direct) as client:
            for source in row.sources:
                self._step(row, source.key, DIRECT, lambda s=source: self._pull(client, row, s, direct=True))
            if client.CAN_PUSH:
                self._step(row, PUSH, DIRECT, lambda: self._push(client, row, f"{PUSH_HOST}/pushed/{row.slug}-0:1"))
        with self._client(row, COLD, self._proxied(row)) as client:
            for source in row.sources:
                self._step(row, source.key, COLD, lambda s=source: self._pull(client, row, s))
                client.forget()
                if client.ENGINE_GOES_DIRECTLY:
                    continue
                self._step(row, source.key, WARM, lambda s=source: self._pull_warm(client, row, s))
                client.forget()
            if client.CAN_PUSH:
                self._step(row, PUSH, PUSH, lambda: self._push(client, row, f"{PUSH_HOST}/pushed/{row.slug}-1:1"))
                self._step(row, HOSTED, HOSTED_PUSH, lambda: self._push(client, row, self._hosted_reference(row)))
                client.forget()
            if row.uses_proxy_only:
                self._step(row, HOSTED, HOSTED_PULL, lambda: self._pull_hosted(client, row))
        self.report(f"{row.client.TITLE} ({row.release})")

    def _run_off(self, row: MatrixRow) -> None:
        if row.client.ENGINE_GOES_DIRECTLY:
            return
        with self._client(row, OFF, self._proxied(row)) as client:
            for source in row.sources:
                self._step(row, source.key, OFF, lambda s=source: self._pull(client, row, s))
            if row.uses_proxy_only:
                self._step(row, HOSTED, HOSTED_OFF, lambda: self._pull_hosted(client, row))

    @contextlib.contextmanager
    def _client(self, row: MatrixRow, phase: str, network: Network) -> Iterator[MatrixClient]:
        # The path is short because sockets are in the folder.
        client = row.client(row.machine, self.folder / f"{row.number}{phase[0]}", network)
        try:
            client.start()
            yield client
        except (AssertionError, subprocess.SubprocessError) as error:
            row.outcomes[ENGINE, phase] = Outcome(Verdict.FAILED, str(error)[-600:])
        finally:
            client.stop()

    @property
    def _ca_environment(self) -> dict[str, str]:
        """The CAs that clients trust, as a host does after it was set up: the upstreams' and the daemon's."""
        file = self.folder / "ca.pem"
        if not file.exists():
            file.write_bytes(self.upstreams.ca.ca_file.read_bytes() + self.daemon.ca_file.read_bytes())
        return {"SSL_CERT_FILE": str(file)}

    @property
    def _direct(self) -> Network:
        url = f"http://127.0.0.1:{self.upstreams.internet.port}"
        environment = {**dict.fromkeys(_UNREACHABLE, url), **self._ca_environment}
        return Network(engine=environment, command=environment)

    def _proxied(self, row: MatrixRow) -> Network:
        """Return the proxy's network. A docker command has no proxy, as on a host that the set-up script has set up."""
        if row.client.MIRRORED_HOSTS:
            return Network(engine=_UNREACHABLE, command=_UNREACHABLE, mirror=f"127.0.0.1:{self.daemon.port}")
        engine = {**self.daemon.client_environment, **self._ca_environment}
        return Network(engine=engine, command=self._direct.command)

    @staticmethod
    def _step(row: MatrixRow, column: str, step: str, action: Callable[[], Outcome]) -> None:
        try:
            row.outcomes[column, step] = action()
        except (AssertionError, subprocess.SubprocessError) as error:
            row.outcomes[column, step] = Outcome(Verdict.FAILED, str(error)[-300:])

    def _pull(self, client: MatrixClient, row: MatrixRow, source: Source, *, direct: bool = False) -> Outcome:
        has_login = source.has_login and (direct or not source.shared_login)
        logins = {source.host: (USER, self.upstreams.password)} if has_login else {}
        return _outcome(client.pull(source.reference(row.slug), logins))

    def _pull_warm(self, client: MatrixClient, row: MatrixRow, source: Source) -> Outcome:
        offset = self.daemon.log_offset()
        outcome = self._pull(client, row, source)
        if outcome.verdict is not Verdict.GOOD:
            return outcome
        name = repository_name(source.reference(row.slug))

        def entries() -> list[tuple[str, str]]:
            return [
                (entry.target, entry.cache_status)
                for entry in self.daemon.access_log(offset)
                if f"/{name}/" in entry.target
            ]

        wait_until(entries, f"the daemon logs a request for {name}")
        downloads = [entry for entry in entries() if "/blobs/" in entry[0] and entry[1] in ("MISS", "PASS")]
        return Outcome(Verdict.DOWNLOADED_AGAIN, str(downloads)) if downloads else outcome

    def _push(self, client: MatrixClient, row: MatrixRow, target: str) -> Outcome:
        """Pull an image of Docker Hub, and push it under the name `target`."""
        source = pushed_image(row.slug)
        pull_outcome = _outcome(client.pull(source, {}))
        if pull_outcome.verdict is not Verdict.GOOD:
            return pull_outcome
        logins = {PUSH_HOST: (USER, self.upstreams.password), HOSTED_REGISTRY_HOST: ("alice", USERS["alice"])}
        return _outcome(client.push(source, target, logins))

    @staticmethod
    def _hosted_reference(row: MatrixRow) -> str:
        return f"{HOSTED_REGISTRY_HOST}/{'pushed' if row.client.CAN_PUSH else 'seeded'}/{row.slug}:1"

    def _pull_hosted(self, client: MatrixClient, row: MatrixRow) -> Outcome:
        return _outcome(client.pull(self._hosted_reference(row), {HOSTED_REGISTRY_HOST: ("alice", USERS["alice"])}))


@frozen
class _HostedEndpoint:
    host: str
    port: int
    uses_tls: bool = False


def _outcome(result: Result) -> Outcome:
    if result.returncode == 0:
        return Outcome(Verdict.GOOD)
    lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    return Outcome(Verdict.FAILED, lines[-1][-400:] if lines else f"exit status {result.returncode}")
