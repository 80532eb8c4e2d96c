"""An answer of JSON lines, sent as things happen, no faster than the client reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dockerproxy.http.request import Request

_PROGRESS_INTERVAL = 0.2  # seconds between two lines that tell of progress

JSON_FIELDS = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
_NDJSON_FIELDS = [("Content-Type", "application/x-ndjson"), ("Cache-Control", "no-store")]


class NDJSONResponse:
    """The answer to `request`, which begins with the first line. `clock` has `seconds`."""

    def __init__(self, clock: Any, request: Request) -> None:
        self._clock = clock
        self._request = request
        self._last_progress: float | None = None
        self._phase = ""

    def send(self, event: str, **fields: Any) -> None:
        """Send a line."""
        self._start()
        self._request.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def send_progress(self, phase: str, done: int, total: int | None) -> None:
        """Send how far the work is, now and then."""
        now = self._clock.seconds()
        if self._last_progress is None or phase != self._phase or now - self._last_progress >= _PROGRESS_INTERVAL:
            self._last_progress, self._phase = now, phase
            self.send("progress", phase=phase, done=done, total=total)

    async def drain(self) -> None:
        """Wait until the client has taken what was sent. Raise `ClientGone`."""
        await self._request.drain()

    def finish(self, **fields: Any) -> None:
        """Send the result, and end."""
        self.send("result", **fields)
        self._request.finish()

    def send_error(self, status: int, code: str, message: str, suggestions: Sequence[str] = ()) -> None:
        """Answer with an error: as a line, where lines were sent."""
        if self._request.started:
            self.send("error", code=code, message=message)
            self._request.finish()
            return
        error = {"code": code, "message": message, "suggestions": list(suggestions)}
        self._request.respond(status, JSON_FIELDS, json.dumps({"error": error}).encode())

    def _start(self) -> None:
        if not self._request.started:
            self._request.start(200, _NDJSON_FIELDS, None)
