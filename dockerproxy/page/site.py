"""The handlers of the page: the content of each address, and the forms that it sends."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlencode

from attrs import define, field

from dockerproxy import __version__
from dockerproxy.admin.api import parse_arguments
from dockerproxy.admin.overview import Overview
from dockerproxy.admin.viewer import Viewer
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import BadRequest, Denied, NameInvalid, NameUnknown, RegistryError, Unsupported
from dockerproxy.http.request import Fields, Request
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host
from dockerproxy.oci.routes import parse_query
from dockerproxy.page import views
from dockerproxy.page.charts import traffic_chart
from dockerproxy.page.place import Place
from dockerproxy.page.rendering import assets, render
from dockerproxy.page.setups import engines
from dockerproxy.page.sign_in import (
    SignIn,
    SignInNeeded,
    Visitor,
    check_form,
    check_own_origin,
    session_cookie,
)
from dockerproxy.registry.principal import Principal

Document = dict[str, Any]

_MAX_FORM = 8192  # bytes
_MAX_NAME = 512  # characters of a name in a form
_MAX_TARGET = 1000
_OWN_PATH = re.compile(r"/[A-Za-z0-9/?&=%@:+._~-]*")
_IMAGES_ON_OVERVIEW = 10
_PER_PAGE = 50
_IMMUTABLE = "public, max-age=31536000, immutable"

_HTML = ("Content-Type", "text/html; charset=utf-8")
_NO_STORE = ("Cache-Control", "no-store")

_DONE = {
    "pinned": "It is pinned: it stays in the cache, and its missing parts are being fetched now.",
    "unpinned": "It is no longer pinned.",
    "asked": "The registry is being asked for it now.",
    "removed": "It was removed.",
    "gone": "It was gone already.",
    "collecting": "Garbage is being collected. Pulls and pushes go on meanwhile.",
    "signed-out": "You have signed out.",
}
"""The sentence of the page after a form, by the code in the address that the browser is sent to."""

ACTIONS = ("pin", "unpin", "refresh", "remove", "gc")


Doctor = Callable[[bool, Viewer], Awaitable[Document]]
"""Returns the health report that a viewer may read. True asks for what is known without asking others."""

Act = Callable[[Principal, str, str, str], Awaitable[str]]
"""Does one of `ACTIONS` with an image of a store, and returns the code of what was done. Raises `RegistryError`."""


ReadHistory = Callable[[str, str], Awaitable[list[Document]]]
"""Returns the last requests for a repository of a store, which administrators see."""


@define(eq=False)
class BrowserPage:
    """Handles the requests for the page. `registries` returns the names of the registries that are cached."""

    _reactor: Any
    _clock: Callable[[], float]
    _sign_in: SignIn
    _overview: Overview
    _doctor: Doctor
    _act: Act
    _read_history: ReadHistory
    _place: Place
    _registries: Callable[[], list[str]]
    _on_proxy_port: bool = field(default=False, kw_only=True)

    async def respond(self, request: Request) -> None:
        """Respond to a request for any address of the page. Raise `RegistryError` if it has no such asset."""
        if request.path.startswith("/assets/"):
            await self._respond_asset(request)
            return
        try:
            if request.method == "POST":
                await self._handle_form(request)
            else:
                await self._show(request)
        except SignInNeeded:
            target = f"{request.path}?{request.query}" if request.query else request.path
            query = urlencode({"next": target}) if request.method != "POST" and target != "/" else ""
            _redirect(request, f"/login?{query}" if query else "/login")
        except RegistryError as error:
            await self._show_error(request, error)

    async def _respond_asset(self, request: Request) -> None:
        name = request.path.removeprefix("/assets/")
        asset = (await in_thread(self._reactor, assets)).get(name)
        if asset is None:
            raise NameUnknown("no such file; it may be of another version of the page, so load the page again")
        tag = f'"{asset.tag}"'
        fields = [("Content-Type", asset.media_type), ("Cache-Control", _IMMUTABLE), ("ETag", tag)]
        known = (request.headers.joined("if-none-match") or "").split(",")
        if any(each.strip().removeprefix("W/") in (tag, "*") for each in known):
            request.respond(304, fields)
        else:
            await request.respond_long(200, fields, asset.content)

    async def _show(self, request: Request) -> None:
        query = parameters(request)
        match [part for part in request.path.split("/") if part]:
            case ["login"]:
                await self._show_login(request, query)
            case []:
                await self._show_overview(request, query)
            case ["images"]:
                await self._show_images(request, query)
            case ["images", *name]:
                await self._show_image(request, decode_path("/".join(name)), query)
            case ["registries"]:
                await self._show_registries(request, query)
            case ["registries", name]:
                await self._show_registry(request, decode_path(name), query)
            case ["clients"]:
                await self._show_clients(request, query)
            case ["doctor"]:
                await self._show_doctor(request)
            case _:
                raise NameUnknown("there is no such page here")

    # The pages

    async def _show_overview(self, request: Request, query: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        viewer, range_name = visitor.viewer, views.range_of(query.get("range", ""))
        overview = await self._overview.get("overview", viewer, {"range": range_name})
        series = await self._overview.get("traffic", viewer, {"range": range_name})
        images = await self._overview.get("images", viewer, {"per_page": str(_IMAGES_ON_OVERVIEW)})
        now = self._clock()
        context = {
            "notices": overview["notices"],
            "numbers": views.numbers(overview),
            "budget": views.budget_card(overview["budget"], now),
            "series": series,
            "chart": traffic_chart(series),
            "transfers": views.transfers(overview["transfers"], now),
            "registries": views.registries(overview["registries"], now),
            "images": images["images"][:_IMAGES_ON_OVERVIEW],
            "complete": images["complete"],
            "repositories": overview["repositories"],
            "setup": self._engines(request)[0].steps[0].commands[0],
            "started": views.started(overview["started"]),
            "workers": overview["workers"],
        }
        await self._respond_page(request, "overview", visitor, context, query)

    async def _show_images(self, request: Request, query: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        names = ("q", "sort", "order", "page", "where")
        arguments = {name: query[name] for name in names if query.get(name)} | {"per_page": str(_PER_PAGE)}
        document = await self._overview.get("images", visitor.viewer, arguments)
        context = views.image_list(document, query.get("where", ""), _PER_PAGE)
        await self._respond_page(request, "images", visitor, context, query)

    async def _show_image(self, request: Request, name: str, query: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        viewer = visitor.viewer
        arguments = {key: query[key] for key in ("where", "page") if query.get(key)} | {"name": name}
        document = await self._overview.get("image", viewer, arguments)
        reference = views.chosen_reference(document, query.get("tag"))
        tag = next((tag for tag in document["tags"] if reference in (tag["tag"], tag["digest"])), None)
        shown = None if tag is None else await self._shown_manifest(viewer, document, tag, query.get("platform"))
        pull = views.pull_command(document["image"], self._place.name)
        context = views.image(document, shown, reference, pull, self._clock())
        context["reasons"] = []
        if viewer.is_admin:
            rows = await self._read_history(document["image"]["name"], document["image"]["where"])
            context["reasons"] = [views.reason(row, self._clock()) for row in rows]
        context["confirm"] = None
        if query.get("confirm") == "remove" and viewer.is_admin and tag is not None:
            context["confirm"] = views.confirm_removal(document["image"], tag)
        await self._respond_page(request, "image", visitor, context, query, nav="images")

    async def _shown_manifest(
        self, viewer: Viewer, document: Document, tag: Document, platform: str | None
    ) -> views.ShownManifest:
        """Return the manifest of a tag, and that of one of its platforms if it is an index."""
        of_image = {"name": document["image"]["name"], "where": document["image"]["where"]}
        manifest = await self._overview.get("manifest", viewer, {**of_image, "digest": tag["digest"]})
        child = views.chosen_platform(manifest["platforms"], platform)
        content = manifest
        if child is not None:
            try:
                content = await self._overview.get("manifest", viewer, {**of_image, "digest": child["digest"]})
            except RegistryError as error:  # `Overview` raises one class for all
                if error.status != 404:
                    raise
                content = {**manifest, "layers": []}
        return views.ShownManifest(manifest, content, None if child is None else child["platform"])

    async def _show_registries(self, request: Request, query: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        range_name = views.range_of(query.get("range", ""))
        document = await self._overview.get("registries", visitor.viewer, {"range": range_name})
        context = {
            "range": range_name,
            "range_text": views.RANGE_TEXTS[range_name],
            "registries": views.registries(document["registries"], self._clock()),
            "fleet": views.fleet(document["fleet"]),
        }
        await self._respond_page(request, "registries", visitor, context, query)

    async def _show_registry(self, request: Request, name: str, query: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        viewer, range_name = visitor.viewer, views.range_of(query.get("range", ""))
        document = await self._overview.get("registry", viewer, {"name": name, "range": range_name})
        row = views.registry(document["registry"], self._clock())
        limits = (await self._overview.get("budget", viewer, {}))["limits"]
        is_hosted = document["registry"]["kind"] == "hosted"
        search = {"where": "hosted"} if is_hosted else {"q": f"{name}/", "where": "cached"}
        images = await self._overview.get("images", viewer, {**search, "per_page": str(_IMAGES_ON_OVERVIEW)})
        context = {
            "row": row,
            "range_text": views.RANGE_TEXTS[range_name],
            "series": document["series"],
            "chart": traffic_chart(document["series"]),
            "budgets": [views.budget(limit, self._clock()) for limit in limits if limit["registry"] == row["name"]],
            "images": images["images"][:_IMAGES_ON_OVERVIEW],
            "count": images["count"],
            "all_images": f"/images?{urlencode(search)}",
        }
        await self._respond_page(request, "registry", visitor, context, query, nav="registries")

    async def _show_clients(self, request: Request, query: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        choices = self._engines(request)
        context = {
            "engines": choices,
            "engine": next((choice for choice in choices if choice.id == query.get("engine")), choices[0]),
            "address": request.host or self._place.name,
            "fingerprint": self._place.ca_fingerprint,
        }
        await self._respond_page(request, "clients", visitor, context, query)

    async def _show_doctor(self, request: Request) -> None:
        visitor = await self._sign_in.visitor(request)
        report, unavailable = None, ""
        try:
            report = views.report(await self._doctor(False, visitor.viewer), self._clock())
        except RegistryError as error:
            unavailable = error.message
        operation = None
        if visitor.viewer.is_admin:
            status = await self._overview.get("status", visitor.viewer, {})
            operation = views.operation(status.get("operation"), self._clock())
        context = {
            "report": report,
            "unavailable": unavailable,
            "operation": operation,
        }
        await self._respond_page(request, "doctor", visitor, context, parameters(request))

    async def _show_login(
        self, request: Request, query: Mapping[str, str], error: RegistryError | None = None, user: str = ""
    ) -> None:
        visitor = await self._sign_in.find(request)
        tls_url = None
        if not request.secure and self._place.tls_port is not None:
            host = Host(self._host(request).name, self._place.tls_port)
            tls_url = f"https://{host}/login" + (f"?{request.query}" if request.query else "")
        context = {
            "has_users": self._sign_in.users is not None,
            "link": query.get("link", "")[:200],
            "next": own_path(query.get("next", "")),
            "tls_url": tls_url,
            "error": None if error is None else error.message,
            "user": user[:255],
        }
        await self._respond_page(request, "login", visitor, context, query, error=error)

    async def _show_error(self, request: Request, error: RegistryError) -> None:
        request.set_error(error)
        titles = {404: "Not found", 403: "Not allowed", 400: "Not understood"}
        context = {
            "status": error.status,
            "title": titles.get(error.status, "Not possible now" if error.status >= 429 else "Not possible"),
            "message": error.message,
        }
        try:
            visitor = await self._sign_in.find(request)
        except RegistryError:
            visitor = Visitor(Viewer())
        await self._respond_page(request, "error", visitor, context, {}, error=error)

    async def _respond_page(
        self,
        request: Request,
        page: str,
        visitor: Visitor,
        context: Mapping[str, Any],
        query: Mapping[str, str],
        *,
        nav: str = "",
        error: RegistryError | None = None,
    ) -> None:
        viewer = visitor.viewer
        frame = {
            "page": nav or page,
            "host": self._host(request).name,
            "user": (viewer.user or "administrator") if visitor.session_token is not None else None,
            "is_administrator": viewer.is_admin and visitor.session_token is not None,
            "csrf": visitor.form_token,
            "secure": request.secure,
            "version": __version__,
            "done": _DONE.get(query.get("done", "")),
            "problems": sum(finding["level"] != "ok" for finding in await self._known_findings(viewer)),
        }
        full_context = {**context, "frame": frame, "now": self._clock()}
        content = await in_thread(self._reactor, render, f"{page}.html", full_context)
        fields = [_HTML, _NO_STORE, ("Vary", "Accept, Cookie"), *(() if error is None else error.headers)]
        await request.respond_long(200 if error is None else error.status, fields, content)

    async def _known_findings(self, viewer: Viewer) -> list[Document]:
        if not self._sign_in.may_see_page(viewer):  # the sign-in page and pages of errors are for everybody
            return []
        try:
            report = await self._doctor(True, viewer)
        except RegistryError:
            return []  # the page itself says it if the main process does not answer
        findings: list[Document] = report["findings"]
        return findings

    def _host(self, request: Request) -> Host:
        """Return the host and port that the visitor came by."""
        default_port = 443 if request.secure else 80
        try:
            return Host.parse(request.host, default_port)
        except NameInvalid:
            return Host(self._place.name, default_port)

    def _engines(self, request: Request) -> Any:
        host = self._host(request)
        proxy = host if self._on_proxy_port and not request.secure else Host(host.name, self._place.proxy_port)
        return engines(proxy if request.secure else host, proxy, self._registries())

    # The forms

    async def _handle_form(self, request: Request) -> None:
        check_own_origin(request)
        media_type = (request.headers.get("content-type") or "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            raise BadRequest("this is not a form")
        try:
            text = (await request.read_all(_MAX_FORM)).decode("ascii")
        except UnicodeDecodeError:
            raise BadRequest("the form is not encoded as browsers do") from None
        form = dict(parse_query(text))
        match [part for part in request.path.split("/") if part]:
            case ["login"]:
                await self._start_session(request, form)
            case ["logout"]:
                visitor = await self._sign_in.find(request)
                check_form(request, visitor, form.get("token", ""))
                await self._sign_in.end(visitor)
                self._sign_in.record(request, "sign-out", visitor.viewer.user)
                _redirect(request, "/?done=signed-out", session_cookie("", secure=request.secure))
            case ["actions", action] if action in ACTIONS:
                await self._do(request, action, form)
            case _:
                raise Unsupported("there is no such form here", headers=[("Allow", "GET, HEAD")])

    async def _start_session(self, request: Request, form: Mapping[str, str]) -> None:
        link = form.get("link", "")
        if link:
            found = await self._sign_in.use_link(link)
            if found is None:
                self._sign_in.record(request, "sign-in", None, accepted=False)
                message = (
                    "this link has been used, or is older than ten minutes; sudo dockerproxy page prints another one"
                )
                await self._show_login(request, {}, Denied(message))
                return
            user, token = found
        else:
            user = form.get("user", "")
            try:
                credentials = BasicCredentials(user, form.get("password", ""))
                if not await self._sign_in.check_password(request, credentials):
                    raise Denied("the user name or the password is wrong")
                token = await self._sign_in.start(user)
            except RegistryError as error:
                request.set_error(error)
                self._sign_in.record(request, "sign-in", user, accepted=False)
                await self._show_login(request, {"next": form.get("next", "")}, error, user)
                return
        self._sign_in.record(request, "sign-in", user)
        _redirect(request, own_path(form.get("next", "")), session_cookie(token, secure=request.secure))

    async def _do(self, request: Request, action: str, form: Mapping[str, str]) -> None:
        visitor = await self._sign_in.visitor(request)
        check_form(request, visitor, form.get("token", ""))
        if not visitor.viewer.is_admin:
            raise Denied("only administrators (ADMIN_USERS) may do this")
        name, where = form.get("name", ""), form.get("where", "")
        if action != "gc" and not 0 < len(name) <= _MAX_NAME:
            raise BadRequest("the form names no image")
        code = await self._act(Principal.of(request, visitor.viewer.user), action, name, where)
        if action == "gc":
            target = "/doctor"
        elif action == "remove":
            target = "/images"
        else:
            repository, reference = views.split_image(name)
            target = views.image_path(repository, where, tag=reference)
        _redirect(request, f"{target}{'&' if '?' in target else '?'}{urlencode({'done': code})}")


def parameters(request: Request) -> dict[str, str]:
    """Return the decoded parameters in the query of `request`. Raise `BadRequest`."""
    query = dict(parse_arguments(request.query))
    if any("\0" in value for value in query.values()):
        raise BadRequest("the URL's query contains a NUL")
    return query


def decode_path(path: str) -> str:
    """Return the name in the percent-encoded `path`. Raise `BadRequest` if it is not UTF-8, or not printable."""
    try:
        name = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("the address is not UTF-8") from None
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise BadRequest("the address is not that of an image or a registry")
    return name


def own_path(target: str) -> str:
    """Return `target` if it is a path of this page, else ``/``. The browser is sent there after it has signed in."""
    is_ours = _OWN_PATH.fullmatch(target) is not None and not target.startswith(("//", "/login", "/logout"))
    return target if is_ours and len(target) <= _MAX_TARGET else "/"


def _redirect(request: Request, target: str, *fields: tuple[str, str]) -> None:
    """Send the browser to another page by GET (RFC 9110, section 15.4.4)."""
    redirect: Fields = [("Location", target), _NO_STORE, *fields]
    request.respond(303, redirect)
