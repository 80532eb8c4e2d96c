"""The page in a real browser, Chromium: no error, nothing from elsewhere, any width, both schemes, without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness.process import wait_until
from tests.page.chromium import (
    console_errors,
    requested_elsewhere,
    run_chromium,
    serve_demo,
    set_view,
    sign_in,
    wait_for,
    why_not,
)

pytestmark = pytest.mark.slow

PATHS = (
    "/", "/images", "/images/docker.io/library/nginx?tag=1.29",
    "/images/docker.io/library/nginx?tag=1.29&confirm=remove",
    "/registries", "/registries/quay.io", "/clients", "/clients?engine=kubernetes", "/doctor", "/login", "/nothing",
)  # fmt: skip

# Contrast by WCAG 2.1, 1.4.3, of each element with text of its own, against the colors behind it.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
const found = [];
for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(".hidden, .skip, svg")) continue;
    const layers = [];
    for (let each = element; each; each = each.parentElement)
        layers.unshift(rgba(getComputedStyle(each).backgroundColor));
    const back = layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    const text = over(rgba(getComputedStyle(element).color), back);
    const [high, low] = [light(text), light(back)].sort((a, b) => b - a);
    const ratio = (high + .05) / (low + .05);
    if (ratio < 4.5) found.push(`${element.tagName} "${element.textContent.trim().slice(0, 30)}" ${ratio.toFixed(2)}`);
}
return found;
"""
# Names by WCAG 4.1.2: each control and each picture has one.
UNNAMED = """
const name = e => e.getAttribute("aria-label") || e.textContent.trim() || e.title || (e.labels && e.labels.length);
return [...document.querySelectorAll("a, button, input:not([type=hidden]), [role=img], [role=meter], [role=region]")]
    .filter(e => !name(e)).map(e => e.outerHTML.slice(0, 200));
"""


# The controls that a user can reach by Tab, in the order of the document.
CONTROLS = """
window.controls = [...document.querySelectorAll("a[href], button, input:not([type=hidden]), summary, [tabindex='0']")]
    .filter(e => e.checkVisibility({visibilityProperty: true}) && !e.disabled && !(e.closest("details:not([open])")
            && e.tagName !== "SUMMARY"));
document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute("tabindex");
return window.controls.length;
"""
# Number of the control that has the focus, and the faults of its looks: it has an outline (WCAG 2.4.7) with a contrast
# of 3 (1.4.11) to its background, and is in view and not below the header (2.4.11).
FOCUSED = """
const e = document.activeElement, style = getComputedStyle(e), wrong = [];
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2) wrong.push("no outline");
let behind = e.parentElement;
while (behind.parentElement && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
const [high, low] = [light(rgba(style.outlineColor)), light(rgba(getComputedStyle(behind).backgroundColor))]
    .sort((a, b) => b - a);
if ((high + .05) / (low + .05) < 3) wrong.push("a faint outline");
const box = e.getBoundingClientRect(), header = document.querySelector("header");
if (!box.width || !box.height || box.bottom < 0 || box.top > innerHeight || box.right < 0 || box.left > innerWidth)
    wrong.push("out of view");
if (!header.contains(e) && !e.classList.contains("skip") && box.bottom <= header.getBoundingClientRect().bottom)
    wrong.push("below the header");
return [window.controls.indexOf(e), wrong.map(text => `${text}: ${e.outerHTML.slice(0, 120)}`)];
"""
# The structure that screen readers announce.
STRUCTURE = """
const wrong = [], all = selector => [...document.querySelectorAll(selector)];
const levels = all("h1, h2, h3, h4, h5, h6").map(e => +e.tagName[1]);
if (levels.filter(level => level === 1).length !== 1 || levels[0] !== 1) wrong.push(`headings ${levels}`);
levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) wrong.push(`headings ${levels}`); });
for (const selector of ["main", "header", "footer", "nav[aria-label='Pages']", "html[lang]", "head title"])
    if (all(selector).length !== 1) wrong.push(`${all(selector).length} times ${selector}`);
for (const table of all("table")) {
    const heads = [...table.querySelectorAll("thead th")];
    if (!heads.length || heads.some(e => e.scope !== "col" || !e.textContent.trim())) wrong.push("a table's header");
    for (const row of table.querySelectorAll("tbody tr")) if (row.cells.length !== heads.length) wrong.push("a row");
}
for (const e of all("svg, img, [role=img]"))
    if (e.ariaHidden !== "true" && !e.ariaLabel && !e.alt) wrong.push(e.outerHTML.slice(0, 120));
for (const e of all("svg:not([aria-hidden])")) if (!e.role && !e.getAttribute("role")) wrong.push("an svg has no role");
const ids = all("[id]").map(e => e.id);
ids.filter((id, i) => ids.indexOf(id) !== i).forEach(id => wrong.push(`two elements are #${id}`));
for (const e of all("[tabindex]")) if (e.tabIndex > 0) wrong.push("a tabindex changes the order");
return wrong;
"""


@pytest.fixture(scope="module", autouse=True)
def _browser_needed() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_demo(tmp_path_factory.mktemp("demo"), moving=True) as url:
        yield url


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with run_chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.mark.parametrize("administrator", [False, True], ids=["anonymous", "administrator"])
def test_every_page(driver: Any, url: str, administrator: bool) -> None:
    url = url.replace("127.0.0.1", "docker-registry.local")  # browsers trust addresses of loopback, also without TLS
    driver.get(f"{url}/login")
    driver.delete_all_cookies()
    if administrator:
        sign_in(driver, url)
    console_errors(driver)
    requested_elsewhere(driver, url)
    for path in PATHS:
        for scheme in ("light", "dark"):
            for width in (1280, 500):
                set_view(driver, width=width, scheme=scheme)
                if (scheme, width) == ("light", 1280):
                    driver.get(url + path)
                where = f"{path} {scheme} {width}"
                assert driver.execute_script("return document.documentElement.scrollWidth") <= width, where
                assert driver.execute_script(CONTRAST) == [], where
        assert driver.execute_script(UNNAMED) == [], path
        errors = console_errors(driver)
        assert [error for error in errors if not (path == "/nothing" and "404" in error)] == [], path
    assert requested_elsewhere(driver, url) == set()


def test_everything_without_scripts(tmp_path: Path, url: str) -> None:
    with run_chromium(tmp_path, scripts=False) as driver:
        driver.get(url)
        text = driver.find_element("tag name", "body").text
        for part in ("91.0 %", "196 GB", "212 GB of 256 GB", "34 of 100 pulls left", "quay.io", "24 clients",
                     "docker.io/library/nginx", "/setup | sudo sh"):  # fmt: skip
            assert part in text, part
        driver.find_element("name", "q").send_keys("nginx\n")
        wait_for(driver, "1 repository")
        assert "docker.io/library/nginx" in driver.find_element("id", "image-list").text
        assert "postgres" not in driver.find_element("id", "image-list").text
        driver.find_element("link text", "docker.io/library/nginx").click()
        wait_for(driver, "docker pull nginx:latest")
        driver.get(f"{url}/clients")
        driver.find_element("link text", "k3s").click()
        wait_for(driver, "registries.yaml")
        sign_in(driver, url)
        driver.get(f"{url}/images/docker.io/library/nginx?tag=1.29")
        driver.find_element("xpath", "//button[.='Ask again']").click()
        wait_for(driver, "The registry is being asked for it now.")
        driver.find_element("link text", "Remove").click()
        wait_for(driver, "Remove it")
        driver.find_element("xpath", "//button[.='Remove it']").click()
        wait_for(driver, "It was removed.")


def test_numbers_move(driver: Any, url: str) -> None:
    set_view(driver, width=1280)
    driver.get(url)

    def widths() -> list[str]:
        script = "return [...document.querySelectorAll('#transfer-rows rect')].map(each => each.getAttribute('width'))"
        found: list[str] = driver.execute_script(script)
        return found

    wait_until(lambda: driver.find_element("id", "live").get_attribute("title") == "updated every second", "events")
    wait_until(lambda: "100.0%" in widths(), "a download reaches its end", timeout=30)
    assert "24 clients" in driver.find_element("id", "transfers").text


def test_a_complete_download_is_shown_as_such_for_a_moment(driver: Any, url: str) -> None:
    """One that failed is simply gone."""
    set_view(driver, width=1280)
    driver.get(url)

    def rows() -> list[str]:
        found: list[str] = [row.text for row in driver.find_elements("css selector", "#transfer-rows tr")]
        return found

    wait_until(lambda: driver.find_element("id", "live").get_attribute("title") == "updated every second", "events")
    assert len(rows()) == 3
    row = driver.find_element("css selector", "#transfer-rows tr[data-id=t3]")
    driver.execute_script("apply({ended: ['t2', 't3', 'unknown'], completed: ['t3', 'unknown']})")
    assert row.find_element("css selector", "rect").get_attribute("width") == "100.0%"
    assert row.find_element("css selector", "svg").get_attribute("aria-valuenow") == "100"
    assert "31 MB of 31 MB" in row.text and "complete" in row.text
    assert not driver.find_elements("css selector", "tr.complete:not(:only-child) ~ tr.complete")
    wait_until(lambda: not driver.find_elements("css selector", "tr.complete"), "the row goes")


def test_search_while_one_types(driver: Any, url: str) -> None:
    set_view(driver, width=1280)
    driver.get(f"{url}/images")
    driver.find_element("name", "q").send_keys("postgres")
    wait_until(lambda: "library/nginx" not in driver.page_source, "the list is short")
    assert "docker.io/library/postgres" in driver.page_source
    assert driver.current_url.endswith("q=postgres&sort=used&order=desc")
    assert driver.switch_to.active_element.get_attribute("name") == "q"


def test_hover_and_copy(driver: Any, url: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    set_view(driver, width=1280)
    driver.get(url)
    ActionChains(driver).move_to_element(driver.find_element("css selector", ".plot .box")).perform()
    wait_until(lambda: "from the cache" in driver.find_element("css selector", ".tip").text, "the values")
    driver.get(f"{url}/clients")
    button = driver.find_element("css selector", ".copy")
    button.click()
    wait_until(lambda: button.text == "Copied", "the command is copied")


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


@pytest.mark.parametrize("administrator", [False, True], ids=["anonymous", "administrator"])
def test_every_control_by_tab(driver: Any, url: str, administrator: bool) -> None:
    """Tab goes through all controls in the order of the document, and each shows that it has the focus."""
    from selenium.webdriver.common.keys import Keys

    set_view(driver, width=1280)
    driver.get(f"{url}/login")
    driver.delete_all_cookies()
    if administrator:
        sign_in(driver, url)
    for path in PATHS:
        for scheme in ("light", "dark"):
            set_view(driver, width=1280, scheme=scheme)
            if scheme == "light":
                driver.get(url + path)
                assert driver.execute_script(STRUCTURE) == [], path
            count, reached = driver.execute_script(CONTROLS), []
            assert count > 8, path
            for _ in range(count):
                press(driver, Keys.TAB)
                number, wrong = driver.execute_script(FOCUSED)
                assert wrong == [], (path, scheme)
                reached.append(number)
            assert reached == list(range(count)), path


def test_actions_by_the_keyboard(driver: Any, url: str) -> None:
    """The skip link, a search, a disclosure, the forms of actions, and the end of the session."""
    from selenium.webdriver.common.keys import Keys

    def focus(selector: str) -> None:
        """Press Tab until the first element that `selector` selects has the focus."""
        driver.execute_script(CONTROLS)
        for _ in range(100):
            press(driver, Keys.TAB)
            if driver.execute_script("return document.activeElement.matches(arguments[0])", selector):
                return
        raise AssertionError(f"no control is {selector}")

    set_view(driver, width=1280)
    driver.get(f"{url}/login")
    driver.delete_all_cookies()
    sign_in(driver, url)
    driver.get(url)
    focus(".skip")
    press(driver, Keys.ENTER, Keys.TAB)
    assert driver.execute_script("return document.querySelector('main').contains(document.activeElement)")
    focus("main input[type=search]")
    press(driver, "postgres", Keys.ENTER)
    wait_for(driver, "1 repository")
    focus("#image-list td a")
    press(driver, Keys.ENTER)
    wait_for(driver, "docker pull postgres")
    focus("summary")
    is_open = "return document.querySelector('details').open"
    assert not driver.execute_script(is_open)
    press(driver, Keys.ENTER)
    assert driver.execute_script(is_open)
    press(driver, Keys.SPACE)
    assert not driver.execute_script(is_open)
    focus("form[action$=refresh] button")
    press(driver, Keys.SPACE)
    wait_for(driver, "The registry is being asked for it now.")
    focus("a.danger")
    press(driver, Keys.ENTER)
    wait_for(driver, "Remove it")
    focus("form[action$=remove] button")
    press(driver, Keys.ENTER)
    wait_for(driver, "It was removed.")
    focus(".copy, form[action$=logout] button")
    press(driver, Keys.ENTER)
    wait_for(driver, "You have signed out.")
