"""The way to the page: its addresses and how many requests it takes at a time. The first one loads the page itself."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from attrs import frozen

from dockerproxy.concurrency import FirstUse
from dockerproxy.errors import NameUnknown
from dockerproxy.http.channel import Handler
from dockerproxy.http.request import Request
from dockerproxy.http.security_fields import security_fields
from dockerproxy.page.sign_in import NO_PAGE, SignIn
from dockerproxy.shares import ClientShares

if TYPE_CHECKING:
    from dockerproxy.page.site import BrowserPage

_POLICY = security_fields(
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
PAGE_FIELDS = f"{_POLICY}Referrer-Policy: same-origin\r\n"
"""The fields of all that the page consists of: everything from here, no script or style within a page."""

TLS_PAGE_FIELDS = f"{PAGE_FIELDS}Cross-Origin-Opener-Policy: same-origin\r\n"
"""The same over TLS. Without it, browsers ignore the last one, and report each page as an error (HTML, 7.1.3)."""


@frozen(eq=False)
class PageDoor:
    """Handles the requests for the page of one port."""

    _page: FirstUse[BrowserPage]
    _sign_in: SignIn
    _requests: ClientShares

    def pages(self, text: Handler) -> dict[str, Handler]:
        """Return the handlers of GET by path. `text` responds to those that want no page at ``/``."""

        def root(request: Request) -> Awaitable[None]:
            is_page = wants_html(request) and not self._sign_in.is_off
            return self.handle(request) if is_page else text(request)

        paths = ("/images", "/images/", "/registries", "/registries/", "/clients", "/doctor", "/login", "/assets/")
        return {"/": root, **dict.fromkeys(paths, self.handle)}

    @property
    def forms(self) -> dict[str, Handler]:
        """The handlers of POST by path."""
        return dict.fromkeys(("/login", "/logout", "/actions/"), self.handle)

    def handle(self, request: Request) -> Awaitable[None]:
        """Respond to a request for any address of the page. Raise `RegistryError` if PAGE=off."""
        request.security_fields = TLS_PAGE_FIELDS if request.secure else PAGE_FIELDS
        return self._handle(request)

    async def _handle(self, request: Request) -> None:
        if self._sign_in.is_off:
            raise NameUnknown(NO_PAGE)
        self._requests.acquire(request.client)
        try:
            page = await self._page.get()
            await page.respond(request)
        finally:
            self._requests.release(request.client)


def wants_html(request: Request) -> bool:
    """Return whether `request` is that of a browser which shows a page. curl and others take anything."""
    return "text/html" in (request.headers.joined("accept") or "").lower()
