"""The page of a real daemon in Chromium, while clients pull and a registry stops, and without scripts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry, throttled
from tests.e2e.harness.images import ACCEPT_MANIFESTS, OCI_CONFIG, OCI_LAYER, TypedContent
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams
from tests.e2e.test_hosted import push_over_http
from tests.e2e.test_image_pulls import Budget, put_index, run_well
from tests.e2e.test_overview import get
from tests.page.chromium import console_errors, requested_elsewhere, run_chromium, set_view, why_not

pytestmark = pytest.mark.slow

MIB = 1 << 20

# Notes each state of the table of downloads: how many rows it has, how far the first is, and how many clients read it.
WATCH = """
window.seen = [];
const rows = document.querySelector("#transfer-rows");
const note = () => { const row = rows.querySelector("tr");
    window.seen.push([rows.children.length, row ? parseFloat(row.querySelector("rect").getAttribute("width")) : null,
                      row ? row.querySelector(".readers").textContent : ""]); };
new MutationObserver(note).observe(rows, {childList: true, subtree: true, attributes: true, characterData: true});
"""


@pytest.fixture(scope="module", autouse=True)
def _browser_needed() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with run_chromium(tmp_path_factory.mktemp("chromium")) as driver:
        set_view(driver, width=1280)
        yield driver


def text_of(driver: Any, selector: str) -> str:
    text: str = driver.execute_script("return document.querySelector(arguments[0]).innerText", selector)
    return text


def open_live(driver: Any, daemon: TwistdDaemon) -> None:
    """Open the overview, wait until events arrive, and mark the page, which a reload would undo."""
    console_errors(driver)
    requested_elsewhere(driver, daemon.url)
    driver.get(daemon.url)
    wait_until(lambda: driver.find_element("id", "live").get_attribute("title") == "updated every second", "events")
    driver.execute_script("window.isTheSame = true")


def check_still_open(driver: Any, daemon: TwistdDaemon) -> None:
    assert driver.execute_script("return window.isTheSame") is True
    assert console_errors(driver) == []
    assert requested_elsewhere(driver, daemon.url) == set()


def put_large_image(upstreams: Upstreams, daemon: TwistdDaemon, name: str, size: int) -> str:
    """Store an image with a layer of `size` bytes, pull its manifest, and return the URL of the layer."""
    layer = TypedContent(OCI_LAYER, images.random_bytes(size, name))
    upstreams.fake.put(name, "1", images.build_image_from_blobs(TypedContent(OCI_CONFIG, b"{}"), [layer]))
    assert daemon.client.get(f"{FAKE}/v2/{name}/manifests/1", Accept=ACCEPT_MANIFESTS).status == 200
    return f"{FAKE}/v2/{name}/blobs/{layer.digest}"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_download_moves_and_ends(
    upstreams: Upstreams, start_daemon: StartDaemon, driver: Any, workers: str, record_property: Any
) -> None:
    """Three clients that read along are one bar, which moves until the download has ended."""
    daemon, gate = start_daemon(WORKERS=workers), threading.Event()
    repository = f"browser/shared-{workers}"
    url = put_large_image(upstreams, daemon, repository, 16 * MIB)
    upstreams.fake.add_rule("GET", f"{repository}/blobs", throttled(4 * MIB, 8 * MIB, gate), times=1)
    open_live(driver, daemon)
    driver.execute_script(WATCH)
    pulls = [threading.Thread(target=daemon.client.get, args=(url,)) for _ in range(3)]
    started = time.monotonic()
    for thread in pulls:
        thread.start()
    try:
        wait_until(lambda: "3 clients" in text_of(driver, "#transfer-rows"), "the bar is for three clients")
        record_property("seconds until the bar is for three clients", round(time.monotonic() - started, 2))
        wait_until(lambda: f"fake.test/{repository}:1\nlayer 1 of 1" in text_of(driver, "#transfer-rows"), "its name")
        assert "1 download for 3 clients" in text_of(driver, "#transfer-sum")
    finally:
        gate.set()
        for thread in pulls:
            thread.join()
    wait_until(lambda: "Nothing is being downloaded" in text_of(driver, "#transfers"), "no download is left")
    seen = driver.execute_script("return window.seen")
    assert max(count for count, _, _ in seen) == 1
    widths = [width for _, width, _ in seen if width is not None]
    assert widths == sorted(widths)
    assert len(set(widths)) >= 3
    assert widths[-1] > 50  # it went on after the gate
    check_still_open(driver, daemon)


def test_an_outage_becomes_a_notice_and_goes(
    upstreams: Upstreams, start_daemon: StartDaemon, driver: Any, record_property: Any
) -> None:
    server = FakeRegistry()
    server.start()
    daemon = start_daemon(
        PROXY_CONNECT_TIMEOUT="2s",
        REGISTRIES="http://outage.test:8081",
        UPSTREAM_ADDRESSES=f"outage.test:8081=127.0.0.1:{server.port}",
    )
    server.put("outage/app", "1", images.build_small_image("outage"))

    def pull() -> str | None:
        url = "http://outage.test:8081/v2/outage/app/manifests/1"
        return daemon.client.get(url, Accept=ACCEPT_MANIFESTS).cache_status

    def is_notice_shown() -> bool:
        return "outage.test:8081 does not answer" in text_of(driver, "#notices")

    try:
        assert pull() == "MISS"
        open_live(driver, daemon)
        assert not is_notice_shown()
        for outage in (1, 2):
            server.stop()
            stopped = time.monotonic()
            assert pull() == "STALE"
            wait_until(is_notice_shown, "the outage is a notice")
            record_property(f"seconds until notice {outage}", round(time.monotonic() - stopped, 2))
            assert "no answer since" in text_of(driver, "#registries")
            server.start()
            wait_until(lambda: pull() == "REVALIDATED", "the registry is asked again")
            answered = time.monotonic()
            wait_until(lambda: not is_notice_shown(), "the notice goes")
            record_property(f"seconds until notice {outage} goes", round(time.monotonic() - answered, 2))
            assert "no answer since" not in text_of(driver, "#registries")
        check_still_open(driver, daemon)
    finally:
        server.stop()


def test_facts_of_a_real_daemon(upstreams: Upstreams, start_daemon: StartDaemon, driver: Any, tmp_path: Path) -> None:
    """An index, a hosted image, a budget, pins and a download are on their pages, with scripts and without."""
    daemon, gate = start_daemon(), threading.Event()
    Budget(upstreams, "browser/facts", 100, 21600)
    put_index(upstreams, "browser/facts")
    hosted = images.build_small_image("browser hosted")
    push_over_http(daemon, "platform/base", "3.1", hosted)
    run_well(daemon, "pin", "fake.test/browser/facts:v1", "--platform", "linux/amd64,linux/arm64")
    url = put_large_image(upstreams, daemon, "browser/large", 4 * MIB)
    upstreams.fake.add_rule("GET", "browser/large/blobs", throttled(4 * MIB, 2 * MIB, gate), times=1)
    pulls = [threading.Thread(target=daemon.client.get, args=(url,)) for _ in range(2)]
    for thread in pulls:
        thread.start()
    try:
        wait_until(lambda: get(daemon, "images")["count"] >= 2, "the repositories are listed", timeout=60)

        def two_clients_read() -> bool:
            return any(transfer["readers"] == 2 for transfer in get(daemon, "transfers")["transfers"])

        wait_until(two_clients_read, "two clients read", timeout=60)
        index_path = "/images/fake.test/browser/facts?tag=v1"
        facts = {
            "/": ("pulls left", "fake.test", "fake.test/browser/facts", "platform/base", "pinned", "2 clients",
                  "fake.test/browser/large", "of 4.19 MB"),
            "/images": ("fake.test/browser/facts", "amd64", "arm64", "pinned", "platform/base", "hosted"),
            "/images?where=pinned": ("1 repository", "fake.test/browser/facts"),
            "/images?q=platform+base": ("1 repository", "platform/base"),
            index_path: ("docker pull fake.test/browser/facts:v1", "index", "amd64", "arm64", "s390x", "2 of 2",
                         "pinned"),
            f"{index_path}&platform=linux/s390x": ("About v1", "s390x"),
            "/images/platform/base?where=hosted": ("3.1", hosted.digest, "2 of 2", "platform/base:3.1"),
            "/registries": ("fake.test", "hosted", "of 100"),
            "/registries/fake.test": ("Rate budget", "of 100 pulls left", "fake.test/browser/facts"),
            "/doctor": ("closed.test",),
        }  # fmt: skip
        with run_chromium(tmp_path, scripts=False) as without_scripts:
            set_view(without_scripts, width=1280)
            for browser in (driver, without_scripts):
                console_errors(browser)
                requested_elsewhere(browser, daemon.url)
                for path, parts in facts.items():
                    browser.get(daemon.url + path)
                    text = browser.find_element("tag name", "body").text
                    assert [part for part in parts if part not in text] == [], (path, browser is driver, text)
                assert console_errors(browser) == []
                assert requested_elsewhere(browser, daemon.url) == set()
    finally:
        gate.set()
        for thread in pulls:
            thread.join()
