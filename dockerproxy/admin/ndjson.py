"""A response of newline-delimited JSON that is sent as the work proceeds, with backpressure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dockerproxy.http.request import Request

_PROGRESS_INTERVAL = 0.2  # seconds between two progress lines of one phase

JSON_FIELDS = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
_NDJSON_FIELDS = [("Content-Type", "application/x-ndjson"), ("Cache-Control", "no-store")]


class NDJSONResponse:
    """The response to `request`. Its head is sent with the first line. `clock` has a method `seconds`."""

    def __init__(self, clock: Any, request: Request) -> None:
        self._clock = clock
        self._request = request
        self._last_progress: float | None = None
        self._phase = ""

    def send(self, event: str, **fields: Any) -> None:
        """Send one line, an event with `fields`."""
        self._start()
        self._request.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def send_progress(self, phase: str, done: int, total: int | None) -> None:
        """Send a progress line, unless the last one of this phase is too recent."""
        now = self._clock.seconds()
        if self._last_progress is None or phase != self._phase or now - self._last_progress >= _PROGRESS_INTERVAL:
            self._last_progress, self._phase = now, phase
            self.send("progress", phase=phase, done=done, total=total)

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
