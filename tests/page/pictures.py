"""The pictures of the page in docs/: `make screenshots`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.page.chromium import PROJECT, run_chromium, serve_demo, set_view, sign_in, why_not

PICTURES = [
    # file, path, width, height, scheme
    ("page", "/", 1200, 830, "light"),
    ("page-dark", "/", 1200, 830, "dark"),
    ("page-image", "/images/docker.io/library/nginx?tag=1.29", 1200, 860, "light"),
    ("page-phone", "/", 500, 900, "light"),
]


def main() -> int:
    """Write the pictures."""
    reason = why_not()
    if reason:
        print(f"no pictures: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve_demo(folder, moving=False) as url, run_chromium(folder) as driver:
            url = url.replace("127.0.0.1", "docker-registry.local")
            sign_in(driver, url)
            for file, path, width, height, scheme in PICTURES:
                set_view(driver, width=width, height=height, scheme=scheme)
                driver.get(url + path)
                time.sleep(1.5)  # until the bars have grown
                driver.save_screenshot(str(PROJECT / "docs" / f"{file}.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
