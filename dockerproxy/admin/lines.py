"""An answer of JSON lines, sent as things happen, no faster than the client reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dockerproxy.http.request import Request

_EVERY = 0.2  # seconds between two lines that tell of progress

_FIELDS = [("Content-Type", "application/x-ndjson"), ("Cache-Control", "no-store")]


class Lines:
    """The answer to `request`, which begins with the first line. `clock` has `seconds`."""

    def __init__(self, clock: Any, request: Request) -> None:
        self._clock = clock
        self._request = request
        self._last: float | None = None
        self._phase = ""

    def send(self, event: str, **fields: Any) -> None:
        """Send a line."""
        self._start()
        self._request.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def progress(self, phase: str, done: int, total: int | None) -> None:
        """Send how far the work is, now and then."""
        now = self._clock.seconds()
        if self._last is None or phase != self._phase or now - self._last >= _EVERY:
            self._last, self._phase = now, phase
            self.send("progress", phase=phase, done=done, total=total)

    async def ready(self) -> None:
        """Wait until the client has taken what was sent. Raise `ClientGone`."""
        await self._request.drain()

    def finish(self, **fields: Any) -> None:
        """Send the result, and end."""
        self.send("result", **fields)
        self._request.finish()

    def refuse(self, status: int, code: str, message: str, suggestions: Sequence[str] = ()) -> None:
        """Answer with an error: as a line, where lines were sent."""
        if self._request.started:
            self.send("error", code=code, message=message)
            self._request.finish()
            return
        error = {"code": code, "message": message, "suggestions": list(suggestions)}
        fields = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        self._request.answer(status, fields, json.dumps({"error": error}).encode())

    def _start(self) -> None:
        if not self._request.started:
            self._request.start(200, _FIELDS, None)
