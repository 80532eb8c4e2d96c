"""Tells a member that its request is being handled, so that silence means a dead member."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.task import LoopingCall

from dockerproxy.http.request import Request

_MAX_REPORTS = 2000  # the other side reads 64 KiB of them before a response
_MAX_REPORTS_IN_BODY = 1000  # the others are for the time after the body


@contextmanager
def reporting_progress(clock: Any, request: Request, timeout: float, limit: float) -> Iterator[None]:
    """Tell a member that waits for `timeout` of progress, until the response starts or `limit` seconds have passed."""
    started, reports = clock.seconds(), 0

    def report() -> None:
        nonlocal reports
        if request.started or request.finished or reports == _MAX_REPORTS or clock.seconds() - started > limit:
            progress.stop()
        elif request.body_ended or reports < _MAX_REPORTS_IN_BODY:
            reports += 1
            request.report_progress()

    progress = LoopingCall(report)
    progress.clock = clock
    progress.start(timeout / 3, now=False).addErrback(lambda _: None)
    try:
        yield
    finally:
        if progress.running:
            progress.stop()
