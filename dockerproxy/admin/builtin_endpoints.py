"""The daemon's own HTTP endpoints: welcome page, CA certificate, set-up script, health checks and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from twisted.internet.defer import Deferred, gatherResults

from dockerproxy.admin.setup import DOCKER_HUB_HOSTS, setup_script
from dockerproxy.errors import BadRequest, NameInvalid
from dockerproxy.http.channel import Handler
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host
from dockerproxy.store.write_probe import StoreProbe, StoreState

_RETRY_AFTER = "10"  # seconds
_NO_STORE = ("Cache-Control", "no-store")
_TEXT_FIELDS = [("Content-Type", "text/plain; charset=utf-8"), _NO_STORE]

_WELCOME = """\
docker-registry-proxy

Docker hosts use this as their HTTP and HTTPS proxy; images are served from its cache.

  /ca.crt           the CA certificate that clients must trust
  /setup            a script that sets up dockerd, containerd, CRI-O and podman on a host:
                    curl -fsS {url}setup | sudo sh
                    curl -fsS {url}setup | sudo sh -s -- --ca-sha256 FINGERPRINT
                    (the second form stops if the CA is not that of `dockerproxy status` on the server)
                    curl -fsS {url}setup | sudo sh -s -- --check
                    (it changes nothing, and says what is wrong with the host's settings)
  /healthz          health check: the daemon is alive
  /readyz           503 if it cannot write to one of its stores
  /metrics          metrics for Prometheus
"""


def builtin_endpoints(
    certificate_pem: bytes,
    metrics: Handler,
    ready: Handler,
    proxy_port: int | None = None,
    *,
    registries: Callable[[], Iterable[str]] = lambda: DOCKER_HUB_HOSTS,
    hosted: str = "docker-registry.local",
    on_proxy_port: bool = False,
) -> dict[str, Handler]:
    """Return the handlers of GET by path. `metrics` handles `/metrics`, and `ready` `/readyz`.
    `registries` returns the hosts that the set-up script checks, and `hosted` is the name of the hosted registry.

    `proxy_port` is the proxy's port without TLS. With `on_proxy_port` a request without TLS came to it, maybe under
    another number (port forwarding), which then counts.
    """

    async def welcome(request: Request) -> None:
        try:
            # After a TLS request, name the plain HTTP port, because the client does not trust our certificate yet.
            url = _base_url(request, proxy_port if request.secure else None)
        except BadRequest:
            url = "http://THIS-HOST:PORT/"
        request.respond(200, _TEXT_FIELDS, _WELCOME.format(url=url).encode())

    async def certificate(request: Request) -> None:
        fields = [("Content-Type", "application/x-x509-ca-cert"), ("Cache-Control", "no-cache")]
        request.respond(200, fields, certificate_pem)

    async def setup(request: Request) -> None:
        same_port = on_proxy_port and not request.secure
        script = setup_script(_base_url(request, None if same_port else proxy_port), registries(), hosted).encode()
        request.respond(200, [("Content-Type", "text/x-shellscript; charset=utf-8"), _NO_STORE], script)

    async def health(request: Request) -> None:
        request.respond(200, _TEXT_FIELDS, b"ok\n")

    return {
        "/": welcome,
        "/ca.crt": certificate,
        "/setup": setup,
        "/setup/systemd": setup,  # as in rpardini/docker-registry-proxy
        "/healthz": health,
        "/readyz": ready,
        "/metrics": metrics,
    }


async def handle_ready(probes: Callable[[], Sequence[StoreProbe]], request: Request) -> None:
    """Respond with 503 if a store cannot be written, and otherwise with 200, within some seconds.

    That a store does not answer is said with 200: the cache goes on, and it may answer at any moment.
    """
    results = await gatherResults([Deferred.fromCoroutine(probe.probe()) for probe in probes()])
    sentences = [result.sentence for result in results if result.sentence]
    failed = [result.sentence for result in results if result.state is StoreState.FAILED]
    fields = [*_TEXT_FIELDS, ("Retry-After", _RETRY_AFTER)] if failed else _TEXT_FIELDS
    content = "".join(f"{sentence}\n" for sentence in failed or ["ready", *sentences])
    request.respond(503 if failed else 200, fields, content.encode())


def _base_url(request: Request, port: int | None) -> str:
    """Return the URL under which the client reaches this proxy, with `port` instead of the request's if given.

    The client's Host field is validated, because the URL becomes part of commands that root runs. Raise `BadRequest`
    if it is invalid.
    """
    try:
        host = Host.parse(request.host, 80)
    except NameInvalid:
        raise BadRequest(
            "the Host field is not a valid host name or address; request this page by the proxy's name or address"
        ) from None
    if port is not None:
        host = Host(host.name, port)
    return f"http://{host.authority.removesuffix(':80')}/"
