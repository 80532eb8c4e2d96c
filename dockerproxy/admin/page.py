"""What the daemon answers in its own name: the CA certificate, the set-up script, whether it is well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import frozen

from dockerproxy.admin.setup import systemd_script
from dockerproxy.errors import NameUnknown, Unsupported
from dockerproxy.http.request import Request

_TEXT = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]

_WELCOME = """\
docker-registry-proxy

Docker hosts use this as their HTTP and HTTPS proxy; images are served from its cache.

  /ca.crt           the CA certificate that clients have to trust
  /setup/systemd    a script that sets up dockerd on a host with systemd:
                    curl -fsS {url}setup/systemd | sudo sh
  /healthz          whether the proxy is well
"""


@frozen
class Page:
    """Answers origin-form requests; `mirror` those to `/v2/`."""

    certificate_pem: bytes
    mirror: Callable[[Request], Awaitable[None]]

    async def answer(self, request: Request) -> None:
        """Answer `request`. Raise `RegistryError`."""
        request.host = request.host or (request.headers.get("host") or "")
        if request.path == "/v2" or request.path.startswith("/v2/"):
            await self.mirror(request)
            return
        if request.method not in ("GET", "HEAD"):
            raise Unsupported(f"{request.path} can only be read", headers=[("Allow", "GET, HEAD")])
        match request.path:
            case "/":
                request.answer(200, _TEXT, _WELCOME.format(url=_url(request)).encode())
            case "/ca.crt":
                fields = [("Content-Type", "application/x-x509-ca-cert"), ("Cache-Control", "no-cache")]
                request.answer(200, fields, self.certificate_pem)
            case "/setup/systemd":
                self._setup(request)
            case "/healthz":
                request.answer(200, _TEXT, b"ok\n")
            case _:
                raise NameUnknown("there is no such page; / tells which there are")

    def _setup(self, request: Request) -> None:
        try:
            script = systemd_script(_url(request))
        except ValueError as error:
            raise NameUnknown(f"no script for you: {error}") from None
        request.answer(200, [("Content-Type", "text/x-shellscript; charset=utf-8"), _TEXT[1]], script.encode())


def _url(request: Request) -> str:
    """Return our own address as the client writes it."""
    return f"http://{request.headers.get('host') or ''}/"
