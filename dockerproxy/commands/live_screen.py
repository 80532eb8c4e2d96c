"""The screen of `top`, drawn by `rich`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dockerproxy.commands.live_view import LiveView
from dockerproxy.commands.status import registry_row
from dockerproxy.control_client import Event
from dockerproxy.terminal import format_count, format_seconds, format_size, printable

_BAR_WIDTH = 20
_FIXED_LINES = 7  # of the screen: headings, headers of the tables, and the keys
_MAX_REGISTRIES = 10
_SHOWN_DIGEST = len("sha256:") + 8


def render(view: LiveView, sort: str, width: int, height: int) -> RenderableType:
    """Return the screen for a terminal of `width` and `height` characters. `sort` is the order of the downloads."""
    registries = view.registries()[: min(_MAX_REGISTRIES, max(0, (height - _FIXED_LINES) // 2))]
    transfers = view.transfers(sort)
    shown = transfers[: max(1, height - _FIXED_LINES - len(registries))]
    more = "" if len(shown) == len(transfers) else f", {len(transfers) - len(shown)} more"
    parts: list[RenderableType] = [
        _line(_summary(view), "bold"),
        _line(f"{format_count(len(transfers), 'download')} under way{more}, by {sort}"),
        _transfer_table(shown, with_bar=width >= 100),
        *([_registry_table(registries)] if registries else []),
        _line("q quit  s sort", "dim"),
    ]
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _summary(view: LiveView) -> str:
    traffic, cache = view.traffic, view.cache
    text = f"{format_size(traffic['served'])}/s to clients, {format_size(traffic['downloaded'])}/s from registries"
    if cache:
        text += f", cache {format_size(cache['bytes'])} of {format_size(cache['limit'])}"
    if view.overview is not None:
        text = f"docker-registry-proxy {view.overview['version']}: {text}"
    return text


def _transfer_table(transfers: Iterable[Event], *, with_bar: bool) -> Table:
    table = _table("IMAGE", *(["PROGRESS"] if with_bar else []), "DONE", "RATE", "LEFT", "CLIENTS")
    for transfer in transfers:
        size, done, rate = transfer["size"], transfer["done"], transfer["rate"]
        digest = "" if transfer["digest"] is None else f" {transfer['digest'][:_SHOWN_DIGEST]}"
        bar = [ProgressBar(total=size or None, completed=min(done, size or done), width=_BAR_WIDTH)] if with_bar else []
        table.add_row(
            _line(f"{transfer['name']}{digest}"),
            *bar,
            format_size(done) + ("" if size is None else f" of {format_size(size)}"),
            "-" if rate is None else f"{format_size(rate)}/s",
            format_seconds(max(0, size - done) / rate) if rate and size is not None else "-",
            str(transfer["readers"]),
        )
    return table


def _registry_table(registries: Iterable[Event]) -> Table:
    table = _table("REGISTRY", "STATE", "REQUESTS", "SERVED", "FROM CACHE", "P95", "BUDGET")
    for registry in registries:
        table.add_row(*map(_line, registry_row(registry)))
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    return table
