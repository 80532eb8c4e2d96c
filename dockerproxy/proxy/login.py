"""The login of the proxy's clients: PROXY_HTPASSWD_FILE."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Concatenate, ParamSpec, Protocol

from attrs import define

from dockerproxy.errors import ProxyAuthenticationRequired
from dockerproxy.http.request import Request
from dockerproxy.oci.credentials import BasicCredentials, is_empty_login

_CHALLENGE = [("Proxy-Authenticate", 'Basic realm="docker-registry-proxy"')]

_Arguments = ParamSpec("_Arguments")


class PasswordCheck(Protocol):
    """The users of the proxy; see `HtpasswdFile`."""

    def has_user(self, user: str) -> bool: ...

    async def check_password(self, credentials: BasicCredentials, client: str) -> bool: ...


@define
class ProxyLogin:
    """Asks the clients of the proxy for a name and a password (407, Basic), if there are `users`.

    Docker, containerd and curl send them from the proxy's URL in Proxy-Authorization, which is never forwarded. The
    client of a mirror can send the same field. A reload replaces `users`.
    """

    users: PasswordCheck | None

    async def check(self, request: Request) -> None:
        """Check the login of `request`, and set its `proxy_user`. Requests in a tunnel have that of the tunnel.

        Raise `ProxyAuthenticationRequired`, or the errors of the password check.
        """
        users = self.users
        if users is None:
            return
        if request.proxy_user is not None:
            if self.allows(request.proxy_user):
                return
            raise _refusal("the user that opened this tunnel was removed")
        values = request.headers.all("proxy-authorization")
        if all(map(is_empty_login, values)):
            raise _refusal("this proxy needs a user name and a password, such as http://USER:PASSWORD@HOST:PORT/")
        credentials = BasicCredentials.parse(values[0]) if len(values) == 1 else None
        if credentials is None or not await users.check_password(credentials, request.client):
            raise _refusal("the user name or the password for this proxy is wrong")
        request.proxy_user = credentials.user

    def allows(self, user: str | None) -> bool:
        """Return whether a tunnel may go on that `user` opened; None is a client without a login."""
        return self.users is None or (user is not None and self.users.has_user(user))

    def guard(
        self, handler: Callable[Concatenate[Request, _Arguments], Awaitable[None]]
    ) -> Callable[Concatenate[Request, _Arguments], Awaitable[None]]:
        """Return a handler that passes requests on to `handler` after their login."""

        async def check_and_handle(request: Request, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            await self.check(request)
            await handler(request, *args, **kwargs)

        def handle(request: Request, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Awaitable[None]:
            if self.users is None:  # no coroutine of our own, because that costs memory for every slow client
                return handler(request, *args, **kwargs)
            return check_and_handle(request, *args, **kwargs)

        return handle


def _refusal(message: str) -> ProxyAuthenticationRequired:
    return ProxyAuthenticationRequired(message, headers=_CHALLENGE)
