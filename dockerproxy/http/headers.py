"""HTTP header fields, of requests from clients and of responses from upstreams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# RFC 9110, section 7.6.1: these fields concern a single connection and are never forwarded.
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip


class Headers:
    """An ordered list of header fields with lookup by lower-case name. Values are decoded as Latin-1."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Iterable[tuple[str, str]] = ()) -> None:
        self._fields = [(name.lower(), value) for name, value in fields]

    @classmethod
    def from_lowercase(cls, fields: list[tuple[str, str]]) -> Headers:
        """Return headers that use `fields` itself; its names must be lower-case already, as a parser makes them."""
        headers = cls.__new__(cls)
        headers._fields = fields
        return headers

    def get(self, name: str) -> str | None:
        """Return the first value of `name` (lower-case), or None."""
        for field, value in self._fields:
            if field == name:
                return value
        return None

    def all(self, name: str) -> list[str]:
        """Return every value of `name` (lower-case), in order."""
        values = []  # each request calls this several times; a comprehension takes half as long again
        for field, value in self._fields:
            if field == name:
                values.append(value)
        return values

    def joined(self, name: str) -> str | None:
        """Return the values of `name` (lower-case) as one comma-separated list, or None (RFC 9110, section 5.3)."""
        values = self.all(name)
        return ", ".join(values) if values else None

    def without(self, *names: str) -> Headers:
        """Return a copy without `names` (lower-case)."""
        return Headers.from_lowercase([field for field in self._fields if field[0] not in names])

    def end_to_end(self) -> Headers:
        """Return a copy without the hop-by-hop fields (RFC 9110, section 7.6.1)."""
        connection_options = {token.strip().lower() for value in self.all("connection") for token in value.split(",")}
        dropped = HOP_BY_HOP | connection_options
        return Headers.from_lowercase([field for field in self._fields if field[0] not in dropped])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._fields)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headers) and self._fields == other._fields

    def __repr__(self) -> str:
        """Show the names only, because values may be credentials."""
        return f"<Headers {' '.join(name for name, _ in self._fields)}>"
