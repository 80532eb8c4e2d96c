"""The templates, style sheet and script of the page. jinja2 and all files are loaded when they are first needed.

Every function blocks, so call it in a thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from attrs import frozen

from dockerproxy.page import words
from dockerproxy.page.charts import RANGES

if TYPE_CHECKING:
    import jinja2

_DIRECTORY = Path(__file__).parent
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_HASH_LENGTH = 16  # hexadecimal digits of a file's hash that its URL has


@frozen
class Asset:
    """A file that the page loads. Its content never changes under its `tag`, which is part of its URL."""

    tag: str
    media_type: str
    content: bytes


@lru_cache(1)
def assets() -> Mapping[str, Asset]:
    """Return the assets by the name in their URL: ``page.HASH.css``."""
    return {
        f"{path.stem}.{asset.tag}{path.suffix}": asset
        for path in sorted((_DIRECTORY / "assets").iterdir())
        if path.suffix in _TYPES
        for asset in [_read_asset(path)]
    }


def _read_asset(path: Path) -> Asset:
    content = path.read_bytes()
    return Asset(hashlib.sha256(content).hexdigest()[:_HASH_LENGTH], _TYPES[path.suffix], content)


@lru_cache(1)
def _asset_urls() -> Mapping[str, str]:
    return {f"{stem}.{suffix}": f"/assets/{name}" for name in assets() for stem, _, suffix in [name.split(".")]}


def render(template: str, context: Mapping[str, Any]) -> bytes:
    """Return a page. `context` has `now` (POSIX time). A name that it lacks is an error."""
    return _environment().get_template(template).render(context).encode("utf-8", "replace")


@lru_cache(1)
def _environment() -> jinja2.Environment:
    import jinja2

    @jinja2.pass_context
    def ago(context: jinja2.runtime.Context, timestamp: float) -> str:
        return words.age(context["now"], timestamp)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DIRECTORY / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(asset=lambda name: _asset_urls()[name], range_names=tuple(RANGES.items()))
    environment.filters.update(
        ago=ago,
        size=words.size,
        count=words.count,
        counted=words.counted,
        percent=words.percent,
        milliseconds=words.milliseconds,
        short_digest=words.short_digest,
        platform=words.platform,
        shortened=words.shortened,
        urlpath=lambda text: quote(text, errors="replace"),
        iso=lambda timestamp: datetime.fromtimestamp(timestamp).astimezone().isoformat("T", "seconds"),
        exactly=lambda timestamp: datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M:%S"),
        compact_json=lambda value: json.dumps(value, separators=(",", ":")),
    )
    return environment
