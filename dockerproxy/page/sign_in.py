"""The senders of requests to the page: sessions in cookies, the rules of PAGE and ADMIN_USERS, tokens of forms."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from typing import Protocol

from attrs import define, field, frozen

from dockerproxy.admin.sessions import SESSION_LIFETIME, Session, SessionStore
from dockerproxy.admin.viewer import Viewer
from dockerproxy.errors import Denied, NameUnknown, Unauthorized
from dockerproxy.http.cross_origin import is_own_origin
from dockerproxy.http.request import Request
from dockerproxy.oci.credentials import BasicCredentials, is_empty_login

PUBLIC, USERS, ADMIN, OFF = "public", "users", "admin", "off"
"""Values of PAGE."""

NO_PAGE = "no such page; / lists the pages"

_TOKEN = re.compile(r"[A-Za-z0-9_-]{20,100}")
_MAX_COOKIES = 8192  # characters
_REALM = "docker-registry-proxy"


class Users(Protocol):
    """The users of HTPASSWD_FILE; see `HtpasswdFile`."""

    def password_hash(self, user: str) -> bytes | None: ...

    async def check_password(self, credentials: BasicCredentials, client: str) -> bool: ...


OnSignIn = Callable[[Request, str, str | None, bool], None]
"""Notes a request's "sign-in" or "sign-out", of a user, which was accepted or not."""


class SignInNeeded(Unauthorized):
    """The page is shown only to users that have signed in, or to administrators."""


@frozen
class Visitor:
    """The sender of a request: their rights, and the token of their session, None if they have none."""

    viewer: Viewer
    session_token: str | None = field(default=None, repr=False)

    @property
    def form_token(self) -> str:
        """The token that forms of this session send. Pages of others cannot read it."""
        if self.session_token is None:
            return ""
        return hmac.new(self.session_token.encode(), b"form", hashlib.sha256).hexdigest()


@define
class SignIn:
    """Knows the visitors by PAGE, ADMIN_USERS and HTPASSWD_FILE. A reload sets these attributes.

    `users` is None without HTPASSWD_FILE. `anonymous_reads_hosted` says whether reading hosted images needs no login.
    """

    _sessions: SessionStore
    _on_sign_in: OnSignIn
    users: Users | None = None
    page: str = PUBLIC
    administrators: frozenset[str] = frozenset()
    anonymous_reads_hosted: bool = True

    @property
    def is_off(self) -> bool:
        """Whether there is no page."""
        return self.page == OFF

    async def visitor(self, request: Request) -> Visitor:
        """Return the sender of `request` to a page, and report the user in the access log. Raise `SignInNeeded`."""
        visitor = await self.find(request)
        self._check(visitor.viewer)
        return visitor

    async def find(self, request: Request) -> Visitor:
        """Return the sender of `request`, also if PAGE does not show them anything. Raise `NameUnknown` if PAGE=off."""
        if self.is_off:
            raise NameUnknown(NO_PAGE)
        token = session_token(request)
        session = None if token is None else await self._sessions.find_session(token)
        viewer = None if session is None else self._viewer_of(session)
        if viewer is None:
            return Visitor(Viewer(reads_hosted=self.anonymous_reads_hosted))
        request.user = viewer.user
        return Visitor(viewer, token)

    async def viewer_of(self, request: Request) -> Viewer:
        """Return the sender of a request to the API: by the cookie of a session, or by a login.

        Raise `NameUnknown`, `Unauthorized`, `Denied` or `TooManyRequests`.
        """
        authorization = request.headers.get("authorization")
        if authorization is None or is_empty_login(authorization):
            viewer = (await self.find(request)).viewer
        else:
            if self.is_off:
                raise NameUnknown(NO_PAGE)
            credentials = BasicCredentials.parse(authorization)
            if self.users is None or credentials is None or not await self.check_password(request, credentials):
                raise _login_needed(request, "the user name or the password is wrong")
            viewer = self._viewer_of_user(credentials.user)
        try:
            self._check(viewer)
        except SignInNeeded as error:
            raise _login_needed(request, error.message) from None
        return viewer

    async def check_password(self, request: Request, credentials: BasicCredentials) -> bool:
        """Return whether a user's login is right. Raise `TooManyRequests`."""
        return self.users is not None and await self.users.check_password(credentials, request.client)

    async def start(self, user: str) -> str:
        """Start a session of `user` after a right password, and return its token. Raise `Denied`."""
        stamp = self.stamp(user)
        if stamp is None:
            raise Denied("the user was removed a moment ago")
        return await self._sessions.start_session(Session(user, stamp))

    async def use_link(self, token: str) -> tuple[str, str] | None:
        """Start a session by a link. Return its user and its token, None if the link has ended."""
        found = await self._sessions.use_sign_in_link(token)
        return None if found is None else (found[0].user, found[1])

    async def end(self, visitor: Visitor) -> None:
        """End the session of `visitor`."""
        if visitor.session_token is not None:
            await self._sessions.end_session(visitor.session_token)

    def record(self, request: Request, what: str, user: str | None, *, accepted: bool = True) -> None:
        """Note a "sign-in" or a "sign-out"."""
        self._on_sign_in(request, what, user, accepted)

    def may_see_page(self, viewer: Viewer) -> bool:
        """Return whether PAGE shows `viewer` more than the sign-in page."""
        try:
            self._check(viewer)
        except SignInNeeded:
            return False
        return True

    def _check(self, viewer: Viewer) -> None:
        if self.page == ADMIN and not viewer.is_admin:
            raise SignInNeeded("this page is for administrators (PAGE=admin); sign in as one of ADMIN_USERS")
        if self.page == USERS and viewer.user is None and not viewer.is_admin:
            raise SignInNeeded("this page is for users (PAGE=users); sign in")

    def _viewer_of(self, session: Session) -> Viewer | None:
        """Return the viewer of a session; None if the user's password has changed or the user was removed."""
        if not session.stamp:
            return Viewer.administrator(session.user)
        stamp = self.stamp(session.user)
        is_valid = stamp is not None and hmac.compare_digest(session.stamp, stamp)
        return self._viewer_of_user(session.user) if is_valid else None

    def _viewer_of_user(self, user: str) -> Viewer:
        return Viewer.administrator(user) if user in self.administrators else Viewer(user, reads_hosted=True)

    def stamp(self, user: str) -> str | None:
        """Return a text that changes with the user's line in the htpasswd file, None if there is none."""
        password_hash = None if self.users is None else self.users.password_hash(user)
        return None if password_hash is None else hashlib.sha256(password_hash).hexdigest()


def check_form(request: Request, visitor: Visitor, token: str) -> None:
    """Raise `Denied` unless a form of our own page, in this session, has sent `request`."""
    check_own_origin(request)
    if not visitor.form_token or not hmac.compare_digest(visitor.form_token.encode(), token.encode("utf-8", "replace")):
        raise Denied("this form is of an earlier session: load the page again, and repeat what you did")


def check_own_origin(request: Request) -> None:
    """Raise `Denied` unless the browser says that a page of our own has sent `request`, which changes something.

    CORS_ORIGINS does not count here: those pages may use the registry, and not what is signed in on ours.
    """
    origins = request.headers.all("origin")
    if len(origins) != 1 or not is_own_origin(origins[0], request.host, secure=request.secure):
        raise Denied("this request does not come from a form of this page (its Origin is missing, or another one)")


def session_token(request: Request) -> str | None:
    """Return the token in the cookie of a session, if there is one."""
    name = cookie_name(secure=request.secure)
    for cookies in request.headers.all("cookie"):
        for cookie in cookies[:_MAX_COOKIES].split(";"):
            key, _, value = cookie.strip().partition("=")
            if key == name and _TOKEN.fullmatch(value):
                return value
    return None


def cookie_name(*, secure: bool) -> str:
    """Return the name of the cookie. Browsers take the one for TLS from this host over TLS only (RFC 6265bis)."""
    return "__Host-dockerproxy" if secure else "dockerproxy"


def session_cookie(token: str, *, secure: bool) -> tuple[str, str]:
    """Return the field that stores the token of a session in the browser, or removes it if it is ""."""
    age = int(SESSION_LIFETIME) if token else 0
    suffix = "; Secure" if secure else ""
    name = cookie_name(secure=secure)
    return "Set-Cookie", f"{name}={token}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict{suffix}"


def _login_needed(request: Request, message: str) -> Unauthorized | Denied:
    # A browser would ask for the login in a window of its own, although the page has a form.
    if "sec-fetch-mode" in request.headers or "mozilla/" in (request.headers.get("user-agent") or "").lower():
        return Denied(message)
    return Unauthorized(message, headers=[("WWW-Authenticate", f'Basic realm="{_REALM}"')])
