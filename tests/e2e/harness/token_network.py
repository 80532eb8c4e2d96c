"""Registries with token servers of their own: on other hosts, shared, with a query, and behind redirects."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry, redirect_to, respond_error, respond_normally
from tests.e2e.harness.http_client import (
    BufferedResponse,
    DirectConnection,
    ProxyClient,
    basic_authorization,
    read_response,
)
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import TypedContent
from tests.e2e.harness.pki import UpstreamCA
from tests.e2e.harness.upstreams import format_upstream_addresses

USER, PASSWORD = "alice", "wonderland"


class TokenRealm(StubServer):
    """Issues tokens for public repositories to everybody, and for those in `private` to USER.

    With `location`, requests to `/token` are redirected there. Requests without the parameters in `required` are
    refused.
    """

    def __init__(self, context: object) -> None:
        super().__init__(context)  # type: ignore[arg-type]
        self.private: set[str] = set()
        self.required: dict[str, str] = {}
        self.location = ""
        self.status = 307
        self.lifetime = 300
        self.readable: dict[str, set[str]] = {}
        """The repositories that each token may pull from. Realms may share it."""
        self._login = basic_authorization(USER, PASSWORD)

    @property
    def queries(self) -> list[str]:
        """The query of each request for a token so far."""
        return [path.partition("?")[2] for request in self.requests if (path := request.path).startswith("/token")]

    @property
    def logins(self) -> list[str | None]:
        """The Authorization of each request so far."""
        return [request.headers.get("authorization") for request in self.requests]

    def handle(self, exchange: HTTPExchange) -> None:
        form = dict(parse_qsl(b"".join(exchange.read_body()).decode()))
        login = exchange.request.headers.get("authorization")
        if "username" in form:
            login = basic_authorization(form["username"], form["password"])
        parameters = [*parse_qsl(exchange.query), *form.items()]
        if self.location and exchange.path == "/token":
            separator = "&" if "?" in self.location else "?"
            return exchange.respond(self.status, {"Location": f"{self.location}{separator}{exchange.query}"})
        if login not in (None, self._login) or not self.required.items() <= dict(parameters).items():
            return respond_error(exchange, 401, "UNAUTHORIZED")
        names = {scope.split(":")[1] for name, scope in parameters if name == "scope" for scope in scope.split()}
        token = secrets.token_hex(16)
        self.readable[token] = names if login else names - self.private
        document = {"token": token, "expires_in": self.lifetime}
        exchange.respond(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def guard(self, registry: FakeRegistry, url: str, service: str, hides_by: int = 401) -> None:
        """Make `registry` serve only clients with a token of this realm, which it names `url`.

        `hides_by` is the status for a token that is good, but not for the repository.
        """

        def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
            name = "/".join(exchange.path.split("/")[2:-2])
            token = (exchange.request.headers.get("authorization") or "").removeprefix("Bearer ")
            if token in self.readable and (not name or name in self.readable[token]):
                return respond_normally(exchange, content)
            if token in self.readable and hides_by != 401:
                return respond_error(exchange, hides_by, "DENIED" if hides_by == 403 else "NAME_UNKNOWN")
            scope = f',scope="repository:{name}:pull"' if name else ""
            challenge = f'Bearer realm="{url}",service="{service}"{scope}'
            return respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate=challenge)

        for method in ("GET", "HEAD"):
            registry.add_rule(method, "^/v2/", respond)


class TokenNetwork:
    """The servers of one test. `registries` is the value of REGISTRIES."""

    def __init__(self, folder: Path) -> None:
        self.ca = UpstreamCA(folder, "the CA of the token network")
        self.registries: list[str] = []
        self._folder = folder
        self._servers: dict[str, StubServer] = {}

    def add_realm(self, host: str, *, tls: bool = True) -> TokenRealm:
        realm = TokenRealm(self.ca.leaf(host).server_context() if tls else None)
        self._add(f"{host}:{443 if tls else 80}", realm)
        return realm

    def add_registry(self, host: str) -> FakeRegistry:
        """Start a registry for `host`, and add it to REGISTRIES."""
        registry = FakeRegistry(self.ca.leaf(host).server_context())
        self._add(f"{host}:443", registry)
        self.registries.append(host)
        return registry

    def add_front(self, host: str, target: str, status: int = 307, pattern: str = "/v2/") -> FakeRegistry:
        """Start a registry for `host` that redirects requests for `pattern` to the registry `target`."""
        front = self.add_registry(host)

        def redirect(exchange: HTTPExchange, content: TypedContent | None) -> None:
            redirect_to(f"https://{target}{exchange.request.path}", status)(exchange, content)

        for method in ("GET", "HEAD"):
            front.add_rule(method, pattern, redirect)
        return front

    def registry(self, host: str) -> FakeRegistry:
        """Return the registry of `host`."""
        server = self._servers[f"{host}:443"]
        assert isinstance(server, FakeRegistry)
        return server

    def _add(self, address: str, server: StubServer) -> None:
        server.start()
        self._servers[address] = server

    @property
    def settings(self) -> dict[str, str]:
        addresses = {address: server.port for address, server in self._servers.items()}
        return {
            "REGISTRIES": " ".join(self.registries),
            "UPSTREAM_ADDRESSES": format_upstream_addresses(addresses),
            "UPSTREAM_CA_FILE": str(self.ca.ca_file),
        }

    def trust_both(self, daemon: TwistdDaemon) -> Path:
        """Return a file with the daemon's CA and the upstreams': a client meets the latter in tunnels."""
        file = self._folder / "both.crt"
        file.write_bytes(daemon.ca_file.read_bytes() + self.ca.ca_file.read_bytes())
        return file

    def request_directly(self, url: str, headers: Mapping[str, str] | None = None) -> BufferedResponse:
        """GET `url` of one of the servers, without the proxy."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        port = parts.port or (443 if parts.scheme == "https" else 80)
        server = self._servers[f"{parts.hostname}:{port}"]
        context = self.ca.client_context() if parts.scheme == "https" else None
        connection = DirectConnection(parts.hostname, ("127.0.0.1", server.port), context)
        try:
            connection.request(
                "GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=dict(headers or {})
            )
            return read_response(connection.getresponse())
        finally:
            connection.close()

    def stop(self) -> None:
        """Stop all servers."""
        for server in self._servers.values():
            server.stop()


class TokenClient:
    """A client in two parts, as BuildKit is: one fetches tokens, the other one uses them. Each may use the proxy."""

    def __init__(self, network: TokenNetwork, proxy: ProxyClient, *, fetch_by_proxy: bool, use_by_proxy: bool) -> None:
        self._network = network
        self._proxy = proxy
        self._fetch_by_proxy = fetch_by_proxy
        self._use_by_proxy = use_by_proxy
        self.realm = ""

    def get(self, url: str, headers: Mapping[str, str] | None = None, *, by_proxy: bool) -> BufferedResponse:
        return self._proxy.request("GET", url, headers) if by_proxy else self._network.request_directly(url, headers)

    def challenge(self, host: str, path: str = "/v2/") -> str | None:
        """Ask `path` of `host` for a challenge. Set `realm`, and return the service. Return None if there is none."""
        response = self.get(f"https://{host}{path}", by_proxy=self._use_by_proxy)
        if response.status != 401:
            return None
        challenge = response.headers["www-authenticate"]
        parameters = dict(part.split("=", 1) for part in challenge.removeprefix("Bearer ").split(","))
        self.realm = parameters["realm"].strip('"')
        return parameters["service"].strip('"')

    def token(self, host: str, name: str, login: str | None = None, path: str = "/v2/") -> str | None:
        """Ask `path` of `host` for a challenge, and fetch a token. Return None if none is needed."""
        service = self.challenge(host, path)
        if service is None:
            return None
        separator = "&" if "?" in self.realm else "?"
        url = f"{self.realm}{separator}service={service}&scope=repository:{name}:pull"
        headers = {} if login is None else {"Authorization": login}
        document = self.get(url, headers, by_proxy=self._fetch_by_proxy)
        assert document.status == 200, document
        token = document.json["token"]
        assert isinstance(token, str)
        return token

    def token_by_form(self, host: str, name: str, user: str, password: str) -> str:
        """Fetch a token by POST (OAuth 2) through the proxy, as containerd and BuildKit do first."""
        service = self.challenge(host) or ""
        fields = {"grant_type": "password", "service": service, "scope": f"repository:{name}:pull"}
        form = urlencode({**fields, "username": user, "password": password}).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
        document = self._proxy.request("POST", self.realm, headers, form)
        assert document.status == 200, document
        return str(document.json["token"])

    def pull(self, host: str, name: str, path: str, login: str | None = None) -> BufferedResponse:
        """Ping, fetch a token, and request `path` of the repository `name`."""
        token = self.token(host, name, login)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return self.get(f"https://{host}/v2/{name}/{path}", headers, by_proxy=self._use_by_proxy)
