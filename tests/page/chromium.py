"""Chromium, driven by selenium, and a server of the page with the data of `demo`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.servers import free_port
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.process import BackgroundProcess, wait_until

PROJECT = Path(__file__).resolve().parents[2]
_HOSTS = "MAP docker-registry.local 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


def why_not() -> str:
    """Return why no browser can be driven here, "" if one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (the extra `test` of setup.cfg)"
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{missing[0]} is not installed (`make test-programs` installs it if root runs it)" if missing else ""


@contextmanager
def serve_demo(folder: Path, *, moving: bool) -> Iterator[str]:
    """Serve the page of `demo` in a process of its own, and yield its URL."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TZ": "UTC"}
    argv = [sys.executable, "-m", "tests.page.demo", str(port), *(["moving"] if moving else [])]
    process = BackgroundProcess(argv, folder / "demo.log", environment, PROJECT)

    def is_up() -> bool:
        try:
            return request_directly("GET", f"http://127.0.0.1:{port}/login").status == 200
        except OSError:
            return False

    process.launch()
    try:
        process.wait_until_ready(is_up)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()


@contextmanager
def run_chromium(folder: Path, *, scripts: bool = True) -> Iterator[Any]:
    """Run Chromium, with JavaScript or without it, and yield its driver. It cannot reach another host."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--no-proxy-server", "--disable-background-networking", "--disable-component-update", "--no-first-run",
        f"--host-resolver-rules={_HOSTS}", f"--user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    if not scripts:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def set_view(driver: Any, *, width: int, height: int = 900, scheme: str = "light") -> None:
    """Set the size of the window in pixels, and whether the user prefers ``light`` or ``dark``."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requested(driver: Any) -> list[str]:
    """Return the addresses that the browser has requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]


def requested_elsewhere(driver: Any, url: str) -> set[str]:
    """Return the addresses, other than those of the server at `url`, that were requested since the last call."""
    return {address for address in requested(driver) if not address.startswith((f"{url}/", "data:", "chrome"))}


def console_errors(driver: Any) -> list[str]:
    """Return the messages on the browser's console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def sign_in(driver: Any, url: str, password: str = "secret") -> None:
    """Sign in as the administrator alice, by the keyboard alone. The default password is that of `demo`."""
    from selenium.webdriver.common.keys import Keys

    driver.get(f"{url}/login")
    driver.switch_to.active_element.send_keys("alice", Keys.TAB)  # the form has the focus
    driver.switch_to.active_element.send_keys(password, Keys.ENTER)
    wait_for(driver, "Sign out")


def wait_for(driver: Any, text: str) -> None:
    """Wait until the page has `text`: a click returns before the next page is there."""
    wait_until(lambda: text in driver.page_source, f"the page has {text!r}")
