from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.download import Download, TooLong
from dockerproxy.cache.origin import Origin
from dockerproxy.errors import (
    RegistryError,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.names import parse_repository
from dockerproxy.upstream.credentials import Anonymous
from tests.cache.stand_ins.reactor import Reactor
from tests.cache.stand_ins.upstream import (
    Answer,
    Upstream,
    cut_after,
    fails,
    flowing,
    instead,
    rangeless,
    refusal,
    says,
    untold,
)
from tests.cache.stand_ins.world import HUB, result

DATA = bytes(range(256)) * 40
ORIGIN = Origin(HUB, parse_repository("library/app"), Anonymous())


class Case:
    """A download of DATA from an upstream that the test instructs."""

    def __init__(self, offset: int = 0, data: bytes = DATA) -> None:
        self.reactor = Reactor()
        self.upstream = Upstream(self.reactor)
        self.digest = self.upstream.repository(ORIGIN.key).put_blob(data)
        self.download = Download(self.reactor, self.upstream, ORIGIN, self.digest, offset)

    def on(self, *behaviours: Any) -> None:
        for behaviour in behaviours:
            self.upstream.on("GET", str(self.digest), behaviour, times=1)

    def open(self, seconds: float = 60) -> None:
        result(Deferred.fromCoroutine(self.download.open()), self.reactor, seconds)

    def read(self, seconds: float = 60) -> bytes:
        return b"".join(self.read_pieces(seconds))

    def read_pieces(self, seconds: float = 60) -> list[bytes]:
        return result(Deferred.fromCoroutine(self.download.read()), self.reactor, seconds)  # type: ignore[no-any-return]

    def read_all(self) -> bytes:
        self.open()
        data = b""
        while got := self.read():
            data += got
        assert self.read() == b""  # and again: it stays the end
        assert all(answer.over for answer in self.upstream.answers)
        return data

    @property
    def ranges(self) -> list[str | None]:
        return [asked.range for asked in self.upstream.asked]


def test_the_whole() -> None:
    case = Case()
    assert case.read_all() == DATA
    assert case.download.size == case.download.offset == len(DATA)
    assert case.ranges == [None]


def test_nothing() -> None:
    case = Case(data=b"")
    assert case.read_all() == b""
    assert case.download.size == 0


def test_the_rest() -> None:
    """The last byte that is there is asked for again."""
    case = Case(offset=1000)
    assert case.read_all() == DATA[1000:]
    assert case.ranges == ["bytes=999-"]
    assert case.download.size == len(DATA)


@pytest.mark.parametrize("offset", [1, len(DATA) - 1])
def test_the_rest_at_either_end(offset: int) -> None:
    assert Case(offset).read_all() == DATA[offset:]


def test_all_is_there_already() -> None:
    """To a Range behind the last byte an upstream could only answer 416."""
    case = Case(offset=len(DATA))
    case.open()
    assert case.download.size == len(DATA)
    assert case.read() == b""
    assert [answer.status for answer in case.upstream.answers] == [206]


def test_resumes_what_breaks_off_again_and_again() -> None:
    case = Case()
    case.on(cut_after(3000), cut_after(1), cut_after(5), cut_after(500))
    assert case.read_all() == DATA
    # A connection that brings nothing but the byte that is known makes no progress.
    assert case.ranges == [None, "bytes=2999-", "bytes=2999-", "bytes=3003-", "bytes=3502-"]


@pytest.mark.parametrize("error", [UpstreamTimeout("silent"), UpstreamUnreachable("gone"), UpstreamBroken("cut")])
def test_backs_off_and_gives_up(error: RegistryError) -> None:
    case = Case()
    case.on(cut_after(3000))
    case.open()
    assert case.read() == DATA[:3000]
    case.upstream.down = error
    case.upstream.forget()
    before, tried = case.reactor.seconds(), []
    reading = Deferred.fromCoroutine(case.download.read())
    outcome: list[Any] = []
    reading.addBoth(outcome.append)
    while not outcome:
        due = min(call.getTime() for call in case.reactor.getDelayedCalls())
        case.reactor.advance(due - case.reactor.seconds())
        case.reactor.settle()
        tried += [case.reactor.seconds() - before] * len(case.upstream.asked)
        case.upstream.forget()
    assert outcome[0].value is error
    assert tried == pytest.approx([0.2, 0.7, 1.7, 3.7, 7.7, 15.7])
    assert case.download.offset == 3000


def test_progress_starts_the_row_anew() -> None:
    case = Case()
    case.on(*[cut_after(2)] * 50)  # the second byte is a new one
    assert case.read_all() == DATA
    assert case.reactor.seconds() < 50 * 0.4  # and not the pauses further on in the row


@pytest.mark.parametrize("status", [429, 500, 503])
def test_goes_on_after_an_upstream_that_fails(status: int) -> None:
    case = Case()
    case.on(cut_after(3000), says(status), says(status))
    assert case.read_all() == DATA


@pytest.mark.parametrize(("asked", "waited"), [("3", 3.0), ("3600", 20.0), ("0", 0.2), ("soon", 0.2)])
def test_waits_as_long_as_upstream_asks_for_within_reason(asked: str, waited: float) -> None:
    case = Case()
    case.on(cut_after(3000), lambda _asked, _data: Answer(429, b"", {"retry-after": asked}))
    case.open()
    case.read()
    began = case.reactor.seconds()
    case.read()
    # The cut costs the first pause, the 429 the second of its row at least.
    assert case.reactor.seconds() - began == pytest.approx(0.2 + max(0.5, waited))


def test_an_upstream_that_announced_too_much_is_given_up_at_once() -> None:
    """No further try makes the content longer."""
    case = Case()
    case.on(cut_after(3000), says(416))
    case.open()
    case.read()
    with pytest.raises(TooLong):
        case.read()
    assert len(case.upstream.asked) == 2


def test_no_second_login_is_tried_when_it_has_ended() -> None:
    case = Case()
    case.on(cut_after(3000), says(401))
    case.open()
    case.read()
    with pytest.raises(UpstreamRefused) as caught:
        case.read()
    assert caught.value.status == 401
    assert len(case.upstream.asked) == 2


def test_an_upstream_that_ignores_the_range() -> None:
    case = Case()
    case.on(cut_after(3000), rangeless)
    assert case.read_all() == DATA


def test_an_upstream_that_ignores_the_range_and_breaks_off_before_it() -> None:
    case = Case()
    whole = lambda size: lambda asked, data: _cut(Answer(200, data, sent=size))  # noqa: E731
    case.on(cut_after(3000), whole(100), whole(2999), whole(3500), rangeless)
    assert case.read_all() == DATA


def _cut(answer: Answer) -> Answer:
    answer.cut()
    return answer


def test_more_than_was_asked_for_is_skipped() -> None:
    case = Case(offset=3000)
    case.on(lambda asked, data: Answer(206, DATA[2000:], {"content-range": f"bytes 2000-{len(DATA) - 1}/{len(DATA)}"}))
    assert case.read_all() == DATA[3000:]


def test_less_than_was_asked_for_is_asked_for_again() -> None:
    """Some servers send no range longer than they like."""
    case = Case(offset=3000)
    case.on(lambda asked, data: Answer(206, DATA[2999:5000], {"content-range": f"bytes 2999-4999/{len(DATA)}"}))
    assert case.read_all() == DATA[3000:]
    assert case.ranges == ["bytes=2999-", "bytes=4999-"]


@pytest.mark.parametrize(
    "told", ["", "bytes 3001-10239/10240", "bytes */10240", "bytes 5-4/3", "items 0-1/2", "bytes 2999-10239"]
)
def test_a_range_that_is_not_what_was_asked_for(told: str) -> None:
    case = Case(offset=3000)
    case.upstream.on("GET", "", lambda asked, data: Answer(206, DATA[2999:], {"content-range": told}))
    with pytest.raises(UpstreamBroken):
        case.open()
    assert len(case.upstream.asked) == 2
    assert all(answer.over for answer in case.upstream.answers)


def test_a_part_is_no_answer_to_a_request_for_all() -> None:
    case = Case()
    case.on(lambda asked, data: Answer(206, DATA, {"content-range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}))
    with pytest.raises(UpstreamFailing):
        case.open()


def test_a_length_that_changes() -> None:
    case = Case()
    case.on(cut_after(3000), instead(DATA + b"more"))
    assert case.read_all() == DATA  # the next answer is right again
    case = Case()
    case.on(cut_after(3000))
    case.open()
    case.read()
    case.upstream.on("GET", "", instead(DATA[:-1]))
    with pytest.raises(UpstreamBroken, match="changed its mind"):
        case.read()


def test_more_than_was_announced() -> None:
    """The framing says one length, the Content-Range another."""
    case = Case(offset=3000)
    case.upstream.on(
        "GET", "", lambda asked, data: Answer(206, DATA[2999:] + b"more", {"content-range": "bytes 2999-10239/10240"})
    )
    case.open()
    with pytest.raises(UpstreamBroken, match="more of"):
        case.read()


def test_an_answer_that_never_ends_is_not_waited_for() -> None:
    """All bytes are here: the connection is given back, whatever may come."""
    case = Case()

    def endless(asked: Any, data: Any) -> Answer:
        answer = Answer(200, DATA, sent=0, length=len(DATA))
        answer.send()
        return answer

    case.on(endless)
    assert case.read_all() == DATA
    assert case.upstream.answers[0].aborted


def test_a_length_that_is_not_told() -> None:
    case = Case()
    case.on(untold)
    case.open()
    assert case.download.size is None
    assert case.read() == DATA
    assert case.read() == b""
    assert case.download.size == len(DATA)


def test_what_was_untold_and_broke_off_is_told_later() -> None:
    case = Case()
    case.on(lambda asked, data: _cut(Answer(200, DATA, length=None, sent=3000)))
    assert case.read_all() == DATA
    assert case.download.size == len(DATA)


def test_what_was_untold_and_broke_off_behind_the_last_byte() -> None:
    case = Case()
    case.on(lambda asked, data: _cut(Answer(200, DATA, length=None, sent=len(DATA))))
    assert case.read_all() == DATA
    assert [answer.status for answer in case.upstream.answers] == [200, 206]


@pytest.mark.parametrize(
    "behaviour",
    [
        lambda asked, data: refusal(416),
        lambda asked, data: Answer(200, DATA[:2000]),
        lambda asked, data: Answer(200, DATA[:2000], length=None),
        lambda asked, data: Answer(206, DATA[2:3], {"content-range": "bytes 2-2/3"}),
    ],
)
def test_less_than_is_here(behaviour: Any) -> None:
    """That is for the caller to know at once: what is here is no beginning of the blob."""
    case = Case(offset=3000)
    case.upstream.on("GET", "", behaviour)
    with pytest.raises(TooLong):
        case.open()
    assert len(case.upstream.asked) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 416])
def test_a_refusal_is_upstreams_own(status: int) -> None:
    case = Case()
    case.on(says(status, x_request_id="7"))
    with pytest.raises(UpstreamRefused) as caught:
        case.open()
    assert caught.value.status == status
    assert b"UPSTREAM" in caught.value.content
    assert ("x-request-id", "7") in caught.value.headers


def test_a_rate_limit_says_when() -> None:
    case = Case()
    case.on(says(429, retry_after="30", ratelimit_limit="100;w=21600", x_other="1"))
    with pytest.raises(UpstreamFailing) as caught:
        case.open()
    assert (caught.value.status, caught.value.code) == (429, "TOOMANYREQUESTS")
    assert dict(caught.value.headers) == {"retry-after": "30", "ratelimit-limit": "100;w=21600"}


@pytest.mark.parametrize("status", [304, 500, 503])
def test_what_is_neither_yes_nor_no(status: int) -> None:
    case = Case()
    case.on(says(status))
    with pytest.raises(UpstreamFailing) as caught:
        case.open()
    assert caught.value.status == 502


def test_opens_at_the_second_try() -> None:
    case = Case()
    case.on(fails(UpstreamBroken("cut")))
    assert case.read_all() == DATA
    assert case.reactor.seconds() >= 0.2


@pytest.mark.parametrize(
    ("error", "tries"), [(UpstreamBroken("cut"), 2), (UpstreamUnreachable("gone"), 1), (UpstreamTimeout("silent"), 1)]
)
def test_does_not_open(error: RegistryError, tries: int) -> None:
    case = Case()
    case.upstream.down = error
    with pytest.raises(type(error)):
        case.open()
    assert len(case.upstream.asked) == tries


def test_what_is_given_back_is_read_again() -> None:
    case = Case()
    case.on(flowing)
    case.open()
    case.upstream.answers[0].send(2000)
    case.upstream.answers[0].send(3000)
    pieces = case.read_pieces()
    assert pieces == [DATA[:2000], DATA[2000:5000]]
    case.download.unread(pieces)
    assert case.download.offset == 0
    assert case.read_pieces() == pieces
    case.upstream.answers[0].end()
    last = case.read_pieces()
    case.download.unread(last)  # the last bytes of all, behind which no answer is left
    assert case.read_pieces() == last
    assert case.read_pieces() == []
    case.download.unread(last)
    assert case.read_pieces() == last


def test_to_abort_closes_the_connection() -> None:
    case = Case()
    case.on(flowing)
    case.open()
    case.download.abort()
    case.download.abort()
    assert case.upstream.answers[0].aborted


def test_who_leaves_while_it_skips_leaves_nothing_open() -> None:
    case = Case(offset=3000)
    case.on(lambda asked, data: Answer(200, DATA, sent=10))
    opening = Deferred.fromCoroutine(case.download.open())
    case.reactor.settle()
    assert len(case.upstream.answers) == 1
    opening.addErrback(lambda _: None)
    opening.cancel()
    assert case.upstream.answers[0].aborted
