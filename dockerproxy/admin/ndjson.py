"""A response of newline-delimited JSON that is sent as the work proceeds, with backpressure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dockerproxy.http.request import Request

JSON_FIELDS = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
_NDJSON_FIELDS = [("Content-Type", "application/x-ndjson"), ("Cache-Control", "no-store")]


class NDJSONResponse:
    """The response to `request`. Its head is sent with the first line."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def send(self, event: str, **fields: Any) -> None:
        """Send one line, an event with `fields`."""
        self._start()
        self._request.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def send_all(self, event: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send a line for each of `rows`, the fields of an event, in one piece."""
        self._start()
        self._request.write(b"".join(json.dumps({"event": event, **fields}).encode() + b"\n" for fields in rows))

    async def drain(self) -> None:
        """Wait until the output buffer has drained. Raise `ClientDisconnected`."""
        await self._request.drain()

    def finish(self, **fields: Any) -> None:
        """Send the result line and finish the response."""
        self.send("result", **fields)
        self._request.finish()

    def send_error(self, status: int, code: str, message: str, suggestions: Sequence[str] = ()) -> None:
        """Finish the response with an error: a line if lines were sent before, otherwise an error response."""
        if self._request.started:
            self.send("error", code=code, message=message)
            self._request.finish()
            return
        error = {"code": code, "message": message, "suggestions": list(suggestions)}
        self._request.respond(status, JSON_FIELDS, json.dumps({"error": error}).encode())

    def _start(self) -> None:
        if not self._request.started:
            self._request.start(200, _NDJSON_FIELDS, None)
