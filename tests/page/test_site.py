"""The page over HTTP, with the data of `demo`: viewers and their pages, forms and their checks, hostile text."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlencode

import pytest

from dockerproxy.admin.sessions import SESSION_LIFETIME, Session
from dockerproxy.errors import NameUnknown, ServiceOverloaded
from dockerproxy.page import views
from dockerproxy.page.site import ACTIONS, own_path
from tests.page.demo import PRIVATE, Demo
from tests.registry.support.synchronous_reactor import SynchronousReactor

PAGES = [
    "/", "/?range=7d", "/images", "/images?q=nginx", "/images/docker.io/library/nginx", "/registries",
    "/registries/docker.io", "/clients", "/clients?engine=k3s", "/doctor", "/login",
]  # fmt: skip
ORIGIN = ("Origin", "http://proxy.example:3128")
FORM = ("Content-Type", "application/x-www-form-urlencoded")
SESSION = re.compile(r"dockerproxy=([A-Za-z0-9_-]+); Path=/; Max-Age=43200; HttpOnly; SameSite=Strict")


@pytest.fixture
def demo() -> Demo:
    return Demo(SynchronousReactor())


class Browser:
    """A client that keeps the cookie and reads the token of forms."""

    def __init__(self, connect: Any, demo: Demo, *, secure: bool = False) -> None:
        self._connect = partial(connect, demo.handle, clock=demo.reactor, secure=secure)
        self.cookie: str | None = None

    def get(self, path: str, *fields: tuple[str, str], method: str = "GET") -> Any:
        return self._connect().fetch(method, path, [*self._cookies(), *fields])

    def post(self, path: str, form: dict[str, str], *fields: tuple[str, str], method: str = "POST") -> Any:
        fields = fields or (ORIGIN, FORM)
        return self._connect().fetch(method, path, [*self._cookies(), *fields], urlencode(form).encode())

    def _cookies(self) -> list[tuple[str, str]]:
        return [] if self.cookie is None else [("Cookie", f"a=b; {self.cookie}; c=d")]

    def sign_in(self, user: str = "alice", password: str = "secret", **form: str) -> Any:
        response = self.post("/login", {"user": user, "password": password, **form})
        for cookie in response.fields("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        return response

    def form_token(self) -> str:
        match = re.search(rb'name="token" value="([0-9a-f]{64})"', self.get("/doctor").body)
        assert match is not None
        return match[1].decode()


@pytest.fixture
def browser(connect_client: Any, demo: Demo) -> Browser:
    return Browser(connect_client, demo)


class _Checker(html.parser.HTMLParser):
    """Fails if a page has inline code or style, refers to another host, or leaves an element open."""

    VOID = frozenset({"meta", "link", "input", "path", "rect", "line", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "action") and value:
                assert value.startswith(("/", "#", "https://proxy.example:3129/login")), value
        if tag == "script":
            assert dict(attributes).get("src", ""), "a script within the page"

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(body: bytes) -> str:
    checker = _Checker()
    checker.feed(body.decode())
    checker.close()
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    return " ".join(" ".join(checker.text).split())


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_complete_and_loads_nothing_from_elsewhere(browser: Browser, path: str) -> None:
    for signed_in in (False, True):
        if signed_in:
            assert browser.sign_in().status == 303
        response = browser.get(path)
        assert response.status == 200, response.body
        check_page(response.body)
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert browser.get(path, method="HEAD").body == b""


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_a_field_that_browsers_take_over_tls_only_is_sent_there_only(
    connect_client: Any, demo: Demo, secure: bool
) -> None:
    """Without TLS, each page would be an error in the browser's console."""
    response = Browser(connect_client, demo, secure=secure).get("/")
    assert response.headers["Cross-Origin-Opener-Policy"] == ("same-origin" if secure else None)


def test_the_overview_has_everything_as_text(browser: Browser) -> None:
    text = check_page(browser.get("/").body)
    for part in ("91.0 %", "196 GB", "212 GB of 256 GB", "34 of 100 pulls left", "quay.io does not answer",
                 "24 clients", "docker.io/library/nginx",
                 "curl -fsS http://proxy.example:3128/setup | sudo sh"):  # fmt: skip
        assert part in text, part
    for engine in ("docker", "k3s", "buildkit"):
        assert "proxy.example" in check_page(browser.get(f"/clients?engine={engine}").body)


def test_assets_are_immutable(browser: Browser) -> None:
    page = browser.get("/").body.decode()
    paths = re.findall(r'"(/assets/[^"]+)"', page)
    assert len(paths) == 3
    for path in paths:
        response = browser.get(path)
        assert response.status == 200
        assert "immutable" in response.headers["Cache-Control"]
        tag = response.headers["ETag"]
        assert browser.get(path, ("If-None-Match", f'"x", {tag}')).status == 304
        assert browser.get(path, ("If-None-Match", '"x"')).status == 200
    for wrong in ("/assets/page.css", "/assets/", "/assets/../site.py", "/assets/page.0000000000000000.css"):
        assert browser.get(wrong).status == 404, wrong


def test_nothing_private_is_in_any_page_of_an_anonymous_viewer(browser: Browser) -> None:
    for path in [*PAGES, f"/images/{PRIVATE}", "/images?q=acme", "/images?q=webshop", "/registries/ghcr.io"]:
        body = browser.get(path).body
        if "q=" not in path and PRIVATE not in path:
            assert b"webshop:main" not in body
        rest = body.replace(b'value="webshop"', b"").replace("“webshop”".encode(), b"").replace(b"charts/webshop", b"")
        assert PRIVATE.encode() not in (b"" if PRIVATE in path else rest), path
    assert b"a private image of ghcr.io" in browser.get("/").body
    assert browser.get(f"/images/{PRIVATE}").status == 404
    browser.sign_in("bob")  # a user is no administrator
    assert PRIVATE.encode() not in browser.get("/").body
    assert b"/actions/" not in browser.get("/images/docker.io/library/nginx").body
    browser.sign_in()
    assert PRIVATE.encode() in browser.get("/").body


def test_a_session_begins_and_ends(browser: Browser, demo: Demo) -> None:
    response = browser.sign_in(next="/images?q=nginx")
    assert response.status == 303
    assert response.headers["Location"] == "/images?q=nginx"
    (cookie,) = response.fields("Set-Cookie")
    assert SESSION.fullmatch(cookie)
    assert b">alice<" in browser.get("/").body
    old_cookie = browser.cookie
    response = browser.post("/logout", {"token": browser.form_token()})
    assert response.status == 303
    assert "Max-Age=0" in response.headers["Set-Cookie"]
    browser.cookie = old_cookie
    assert b">alice<" not in browser.get("/").body
    assert demo.sign_ins == [("sign-in", "alice", True), ("sign-out", "alice", True)]
    browser.sign_in()
    demo.reactor.advance(SESSION_LIFETIME)
    assert b">alice<" not in browser.get("/").body


def test_a_session_ends_with_the_password_and_with_the_user(browser: Browser, demo: Demo) -> None:
    for change in (lambda user: b"another hash", lambda user: None):
        browser.sign_in()
        assert b">alice<" in browser.get("/").body
        users: Any = demo.sign_in.users
        original, users.password_hash = users.password_hash, change
        assert b">alice<" not in browser.get("/").body
        users.password_hash = original


@pytest.mark.parametrize(("user", "password"), [("alice", "wrong"), ("nobody", "secret"), ("", ""), ("a:b", "x\0")])
def test_a_wrong_login_says_so(browser: Browser, demo: Demo, user: str, password: str) -> None:
    response = browser.sign_in(user, password)
    assert response.status == 403
    assert "the user name or the password is wrong" in check_page(response.body)
    assert not response.fields("Set-Cookie")
    assert demo.sign_ins == [("sign-in", user, False)]


def test_a_link_signs_in_once(browser: Browser, demo: Demo) -> None:
    demo.sign_in.users = None
    assert "sudo dockerproxy page" in check_page(browser.get("/login").body)
    token = demo.sessions.make_sign_in_link("root")
    for _ in range(2):  # a program that looks at links does not use it up
        assert token in browser.get(f"/login?link={token}").body.decode()
    response = browser.post("/login", {"link": token})
    assert response.status == 303
    second = browser.post("/login", {"link": token})
    assert second.status == 403
    assert "has been used" in check_page(second.body)
    browser.cookie = response.headers["Set-Cookie"].partition(";")[0]
    assert "Collect garbage" in check_page(browser.get("/doctor").body)
    late = demo.sessions.make_sign_in_link("root")
    demo.reactor.advance(600)
    assert browser.post("/login", {"link": late}).status == 403


def test_a_password_without_tls_is_warned_of(connect_client: Any, demo: Demo) -> None:
    text = Browser(connect_client, demo).get("/login?next=/doctor").body.decode()
    assert "This connection is not encrypted" in text
    assert 'href="https://proxy.example:3129/login?next=/doctor"' in text
    secure = Browser(connect_client, demo, secure=True)
    assert b"not encrypted" not in secure.get("/login").body
    response = secure.post(
        "/login", {"user": "alice", "password": "secret"}, ("Origin", "https://proxy.example:3128"), FORM
    )
    assert re.fullmatch(r"__Host-dockerproxy=\S+; Path=/; .*; HttpOnly; SameSite=Strict; Secure",
                        response.headers["Set-Cookie"])  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_needs_a_form_of_this_page(browser: Browser, demo: Demo, action: str) -> None:
    browser.sign_in()
    token = browser.form_token()
    good = {"token": token, "name": "docker.io/library/nginx:1.29", "where": "cached"}
    path = f"/actions/{action}"
    refused = [
        browser.post(path, good, ("Origin", "http://evil.example"), FORM),
        browser.post(path, good, ("Origin", "http://proxy.example:8080"), FORM),
        browser.post(path, good, ("Origin", "null"), FORM),
        browser.post(path, good, FORM),
        browser.post(path, good, ORIGIN, ORIGIN, FORM),
        browser.post(path, {**good, "token": ""}),
        browser.post(path, {**good, "token": "0" * 64}),
        browser.post(path, {**good, "token": "é"}),
        browser.post(path, {name: value for name, value in good.items() if name != "token"}),
    ]
    assert [response.status for response in refused] == [403] * len(refused)
    assert browser.post(path, good, ORIGIN, ("Content-Type", "text/plain")).status == 400
    assert browser.get(path).status == 404
    assert browser.get(f"{path}?{urlencode(good)}").status == 404
    assert demo.actions == []
    for _ in range(2):  # twice
        response = browser.post(path, good)
        assert response.status == 303
        assert browser.get(response.headers["Location"]).status in (200, 404)
    name = "" if action == "gc" else good["name"]
    assert {(user, done) for user, done, _, _ in demo.actions} == {("alice", action)}
    assert all(name in each for _, _, each, _ in demo.actions)


def test_actions_are_for_administrators(connect_client: Any, demo: Demo) -> None:
    form = {"name": "docker.io/library/nginx:1.29", "where": "cached"}
    anonymous, bob, alice = (Browser(connect_client, demo) for _ in range(3))
    bob.sign_in("bob")
    alice.sign_in()
    match = re.search(rb'name="token" value="([0-9a-f]{64})"', bob.get("/").body)
    assert match is not None
    for visitor, token in ((anonymous, ""), (bob, match[1].decode()), (bob, alice.form_token()), (anonymous, "0" * 64)):
        assert visitor.post("/actions/remove", {**form, "token": token}).status == 403
    assert demo.actions == []


def test_a_removal_is_asked_for_first(browser: Browser) -> None:
    path = "/images/docker.io/library/nginx?tag=1.29&confirm=remove"
    assert b"Remove it" not in browser.get(path).body
    browser.sign_in()
    body = browser.get(path).body
    assert "Remove docker.io/library/nginx:1.29?" in check_page(body)
    assert b'action="/actions/remove"' in body


@pytest.mark.parametrize(("page", "user", "status"), [
    ("public", None, 200), ("users", None, 303), ("users", "bob", 200), ("admin", None, 303), ("admin", "bob", 303),
    ("admin", "alice", 200), ("off", None, 404), ("off", "alice", 404),
])  # fmt: skip
def test_page_setting(browser: Browser, demo: Demo, page: str, user: str | None, status: int) -> None:
    if user is not None:
        browser.sign_in(user)
    demo.sign_in.page = page
    for path in (*PAGES[:-1], "/images/x"):
        found = browser.get(path).status
        assert found in ((200, 404) if status == 200 else (status,)), path
    if status == 303:
        response = browser.get("/images?q=a")
        assert response.headers["Location"] == "/login?next=%2Fimages%3Fq%3Da"
        assert browser.get("/login").status == 200
    live = browser.get("/api/v1/live")
    assert (live.status == 200) == (status == 200)


@pytest.mark.parametrize(("page", "user", "shown"), [
    ("public", None, True), ("users", None, False), ("users", "bob", True), ("admin", "bob", False),
    ("admin", "alice", True),
])  # fmt: skip
def test_whom_the_page_refuses_learns_nothing_from_its_frame(
    browser: Browser, demo: Demo, page: str, user: str | None, shown: bool
) -> None:
    """The sign-in page and the pages of errors are for everybody, the number of problems is not."""
    if user is not None:
        browser.sign_in(user)
    demo.sign_in.page = page
    assert (b'id="problems"' in browser.get("/login").body) is shown
    assert (b'id="problems"' in browser.get("/images?q=%00").body) is shown


HOSTILE = [
    '"><script>alert(1)</script>', "<img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}", "javascript:alert(1)",
    "\u202egpj.exe", "\x1b[31mred\r\n", "' onmouseover='alert(1)", "a" * 100_000, "</textarea></svg>", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_text_of_strangers_is_escaped_and_bounded(browser: Browser, demo: Demo, text: str) -> None:
    browser.sign_in()
    demo.overview.hostile = text
    for path in ("/", "/images", "/images/docker.io/library/nginx", "/registries/docker.io"):
        body = browser.get(path).body
        shown = check_page(body)
        assert b"<script>alert" not in body
        assert b"<img" not in body
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert len(body) < 400_000
        assert "49" not in shown.replace("149", "") or "{{" not in text


@pytest.mark.parametrize(
    "query",
    ["q=" + "x" * 10_000, "q=%00", "q=%ff", "q=%", "q=%3Cscript%3E", "q=" + "%F0%9F%98%80" * 300, "page=-1", "page=x",
     "sort=%27", "range=%3C", "tag=%00", "confirm=remove", "done=%3Cb%3E", "engine=%3C", "=", "&&", "q=a&q=b"],
)  # fmt: skip
def test_any_query_is_a_page_or_a_400(browser: Browser, query: str) -> None:
    browser.sign_in()
    for path in ("/", "/images", "/images/docker.io/library/nginx", "/registries/docker.io", "/clients", "/login"):
        response = browser.get(f"{path}?{query}")
        assert response.status in (200, 400), (path, response.body)
        assert b"<script>" not in response.body
        assert b"<b>" not in response.body
        check_page(response.body)


@pytest.mark.parametrize("path", ["/images/%00", "/images/%ff", "/images/" + "a" * 600, "/images/%0d%0aSet-Cookie:x",
                                  "/images//", "/registries/%3Cscript%3E", "/images/%2e%2e/%2e%2e/etc"])  # fmt: skip
def test_any_path_is_a_page(browser: Browser, path: str) -> None:
    response = browser.get(path)
    assert response.status in (200, 400, 404)
    assert b"<script>" not in response.body
    assert not response.fields("Set-Cookie")
    check_page(response.body)


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nX: y",
                                    "", "login", "/login", "/logout", "/" + "a" * 2000, "/é", "/\t/evil"])  # fmt: skip
def test_the_browser_is_sent_to_our_own_pages_only(target: str) -> None:
    assert own_path(target) == "/"


def test_a_main_process_that_does_not_answer_is_a_page_too(browser: Browser, demo: Demo) -> None:
    async def get(*arguments: object) -> Any:
        raise ServiceOverloaded("the main process does not answer", headers=[("Retry-After", "10")])

    overview: Any = demo.overview
    overview.get = get
    for path in PAGES[:-3]:
        response = browser.get(path)
        if path.startswith("/clients"):
            continue
        assert response.status == 503
        assert response.headers["Retry-After"] == "10"
        assert "the main process does not answer" in check_page(response.body)


def test_requests_of_one_client_are_bounded(browser: Browser, demo: Demo) -> None:
    demo.requests.add("10.1.2.3", 128)
    response = browser.get("/")
    assert response.status == 429
    assert response.headers["Retry-After"]


def test_a_form_has_a_bound(browser: Browser) -> None:
    assert browser.post("/login", {"user": "a" * 20_000}).status == 413


def test_sessions_are_bounded(demo: Demo) -> None:
    async def start(count: int, user: Callable[[int], str]) -> list[str]:
        return [await demo.sessions.start_session(Session(user(number), "stamp")) for number in range(count)]

    def run(coroutine: Any) -> Any:
        try:
            coroutine.send(None)
        except StopIteration as result:
            return result.value
        raise AssertionError("it waits")

    first, *rest = run(start(21, lambda number: "alice"))
    assert run(demo.sessions.find_session(first)) is None
    assert all(run(demo.sessions.find_session(token)) == Session("alice", "stamp") for token in rest)
    (others := run(start(1000, lambda number: f"user{number}")))
    assert run(demo.sessions.find_session(rest[-1])) is None
    assert run(demo.sessions.find_session(others[-1])) is not None
    assert run(demo.sessions.find_session("x" * 43)) is None


def test_an_unknown_image_is_a_404_with_a_page(browser: Browser) -> None:
    response = browser.get("/images/docker.io/library/none")
    assert response.status == NameUnknown.status
    assert "there is no image docker.io/library/none" in check_page(response.body)


def test_members_of_the_fleet_are_on_the_page_of_registries(browser: Browser, demo: Demo) -> None:
    assert 'id="fleet"' not in browser.get("/registries").body.decode()
    hostile = "<script>alert(1)</script>"
    demo.overview.members = {"10.0.0.1:3128": "me", "10.0.0.2:3128": "up", "10.0.0.3:3128": hostile}
    page = browser.get("/registries").body.decode()
    text = check_page(page.encode())
    assert "1 down" in text and "other members: 3 GB. Sent to them: 5 GB." in text and "10.0.0" not in page
    assert browser.sign_in().status == 303
    page = browser.get("/registries").body.decode()
    assert f"down: {hostile}" in check_page(page.encode()) and hostile not in page
    assert all(address in page for address in demo.overview.members)


@pytest.mark.parametrize(
    ("up", "problem", "state"),
    [
        (None, "", ("idle", "not asked yet")),
        (True, "", ("ok", "answers")),
        (True, "the login was refused", ("warn", "warning")),
        (False, "", ("bad", "does not answer")),
    ],
)
def test_only_a_registry_that_answers_is_green(up: bool | None, problem: str, state: tuple[str, str]) -> None:
    assert views._registry_state({"up": up, "problem": problem}, is_hosted=False) == state
