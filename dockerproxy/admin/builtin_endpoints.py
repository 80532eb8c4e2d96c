"""What the daemon answers in its own name: the CA certificate, the set-up script, whether it is well, its metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import frozen

from dockerproxy.admin.setup import setup_script
from dockerproxy.errors import BadRequest, NameInvalid, NameUnknown, Unsupported
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host

_NO_STORE = ("Cache-Control", "no-store")
_TEXT_FIELDS = [("Content-Type", "text/plain; charset=utf-8"), _NO_STORE]

_WELCOME = """\
docker-registry-proxy

Docker hosts use this as their HTTP and HTTPS proxy; images are served from its cache.

  /ca.crt           the CA certificate that clients have to trust
  /setup            a script that sets up dockerd, containerd, CRI-O and podman on a host:
                    curl -fsS {url}setup | sudo sh
  /healthz          whether the proxy is well
  /metrics          what it has done, for Prometheus
"""


@frozen
class BuiltinEndpoints:
    """Answers origin-form requests; `registry` those to `/v2/`, `metrics` those to `/metrics`.

    `proxy_port` is the proxy's port where the page is at another.
    """

    certificate_pem: bytes
    registry: Callable[[Request], Awaitable[None]]
    metrics: Callable[[Request], Awaitable[None]]
    proxy_port: int | None = None

    async def handle(self, request: Request) -> None:
        """Answer `request`. Raise `RegistryError`."""
        request.host = request.host or (request.headers.get("host") or "")
        if request.path == "/v2" or request.path.startswith("/v2/"):
            await self.registry(request)
            return
        if request.method not in ("GET", "HEAD"):
            raise Unsupported(f"{request.path} can only be read", headers=[("Allow", "GET, HEAD")])
        match request.path:
            case "/":
                self._serve_welcome(request)
            case "/ca.crt":
                fields = [("Content-Type", "application/x-x509-ca-cert"), ("Cache-Control", "no-cache")]
                request.respond(200, fields, self.certificate_pem)
            case "/setup" | "/setup/systemd":  # the latter is rpardini/docker-registry-proxy's address
                self._serve_setup_script(request)
            case "/healthz":
                request.respond(200, _TEXT_FIELDS, b"ok\n")
            case "/metrics":
                await self.metrics(request)
            case _:
                raise NameUnknown("there is no such page; / tells which there are")

    def _serve_welcome(self, request: Request) -> None:
        try:
            # With TLS the certificate would be one that is not trusted yet.
            url = _base_url(request, self.proxy_port if request.secure else None)
        except BadRequest:
            url = "http://THIS-HOST:PORT/"
        request.respond(200, _TEXT_FIELDS, _WELCOME.format(url=url).encode())

    def _serve_setup_script(self, request: Request) -> None:
        script = setup_script(_base_url(request, self.proxy_port)).encode()
        request.respond(200, [("Content-Type", "text/x-shellscript; charset=utf-8"), _NO_STORE], script)


def _base_url(request: Request, port: int | None) -> str:
    """Return our own address as the client knows it, checked: it goes into commands that are run as root.

    With a `port`, that of our door there.
    """
    try:
        host = Host.parse(request.host, 80)
    except NameInvalid:
        raise BadRequest("your Host field does not tell under which address you reach this proxy") from None
    if port is not None:
        host = Host(host.name, port)
    return f"http://{host.authority.removesuffix(':80')}/"
