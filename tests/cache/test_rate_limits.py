"""The rate limits of registries: parsing, refusals until a time, one probe after it, several processes, restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.rate_limits import LIMIT, RateLimit, RateLimits, stored_limits
from dockerproxy.errors import UpstreamFailing
from dockerproxy.http.headers import Headers
from dockerproxy.oci.docker_hub import DOCKER_HUB
from dockerproxy.oci.names import Registry
from dockerproxy.store.records import Records

QUAY = Registry.parse("quay.io")
NOW = 1_800_000_000.0
FIELDS = Headers([
    ("RateLimit-Limit", "100;w=21600"), ("RateLimit-Remaining", "34;w=21600"), ("Docker-RateLimit-Source", "192.0.2.7")
])  # fmt: skip
NOTHING = Headers()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(tmp_path: Path, clock: Clock) -> RateLimits:
    return RateLimits(Records(tmp_path / "records"), clock)


def is_refused(limits: RateLimits, registry: Registry = DOCKER_HUB, identity: str = PUBLIC) -> bool:
    try:
        limits.check(registry, identity)
    except UpstreamFailing as error:
        assert error.status == 429
        return True
    return False


def test_docker_hubs_fields() -> None:
    limit = RateLimit().after(FIELDS, NOW)
    assert limit == RateLimit(100, 21600, 34, "192.0.2.7", NOW, since=NOW)
    later = limit.after(Headers([("ratelimit-remaining", "33;w=21600")]), NOW + 1)
    assert later == evolve(limit, remaining=33, seen=NOW + 1)
    assert limit.after(NOTHING, NOW + 2) is limit


def test_a_torn_record_is_left_out(tmp_path: Path, limits: RateLimits) -> None:
    """A power cut leaves one. The metrics and the budget have the others."""
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("Retry-After", "600")]))
    long_name = Registry.parse(".".join(["long-label"] * 15))
    limits.note(long_name, PUBLIC, "GET", 429, Headers([("Retry-After", "600")]))
    records = Records(tmp_path / "records")
    assert {registry for registry, _ in stored_limits(records, NOW)} == {DOCKER_HUB, long_name}
    for entry in list(records.walk(LIMIT)):
        if entry.key[-1] == str(long_name.host):
            Path(entry.path).write_bytes(b"{")
    assert [registry for registry, _ in stored_limits(records, NOW)] == [DOCKER_HUB]


@pytest.mark.parametrize("value", ["", "many", "-1", "100;w=", "100;w=x", "100,200", "1" * 10, "\u0663", "1;w=1;x=2"])
def test_odd_fields_are_ignored(value: str) -> None:
    headers = Headers([("ratelimit-limit", value), ("ratelimit-remaining", value)])
    assert RateLimit().after(headers, NOW) == RateLimit()


@given(st.text(), st.text(), st.text())
@example("100;w=0", "0;w=0", "a\nb")
def test_any_fields(limit: str, remaining: str, source: str) -> None:
    headers = Headers([("ratelimit-limit", limit), ("ratelimit-remaining", remaining)])
    headers = Headers([*headers, ("docker-ratelimit-source", source)])
    known = RateLimit().after(headers, NOW)
    assert known.describe(QUAY).startswith("quay.io") and "\n" not in known.describe(QUAY)


def test_pulls_are_refused_until_the_time_that_the_registry_named(limits: RateLimits, clock: Clock) -> None:
    limits.note(DOCKER_HUB, PUBLIC, "GET", 200, FIELDS)
    assert not is_refused(limits)
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("Retry-After", "600")]))
    with pytest.raises(UpstreamFailing) as caught:
        limits.check(DOCKER_HUB, PUBLIC)
    assert caught.value.headers == (
        ("Retry-After", "601"), ("RateLimit-Limit", "100;w=21600"), ("RateLimit-Remaining", "34;w=21600"),
    )  # fmt: skip
    assert caught.value.message == (
        "Docker Hub allows 100 pulls in 6 h for 192.0.2.7; it refuses more until about 08:10:00 UTC; what is cached "
        "goes on; a login for auth.docker.io in AUTH_REGISTRIES raises the limit"
    )
    assert not is_refused(limits, QUAY)
    clock.now += 599
    assert is_refused(limits)


def test_a_refusal_without_a_time_is_short_at_first(limits: RateLimits, clock: Clock) -> None:
    """Many registries limit the requests of a second, and a client without a proxy would soon succeed."""
    for seconds in (2, 4, 8, 16, 32, 64, 64):
        limits.note(QUAY, PUBLIC, "GET", 429, NOTHING)
        clock.now += seconds - 0.1
        assert is_refused(limits, QUAY)
        clock.now += 0.1
        assert not is_refused(limits, QUAY)
    limits.note(QUAY, PUBLIC, "GET", 200, NOTHING)
    limits.note(QUAY, PUBLIC, "GET", 429, NOTHING)
    clock.now += 2
    assert not is_refused(limits, QUAY)


def test_a_refusal_without_a_time_is_longer_if_no_pull_is_left(limits: RateLimits, clock: Clock) -> None:
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("ratelimit-remaining", "0;w=21600")]))
    clock.now += 59
    assert is_refused(limits)


def test_one_request_asks_whether_the_refusal_has_ended(limits: RateLimits, clock: Clock) -> None:
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("Retry-After", "60")]))
    clock.now += 60
    assert [is_refused(limits) for _ in range(3)] == [False, True, True]
    clock.now += 10  # that one got no answer
    assert [is_refused(limits) for _ in range(3)] == [False, True, True]
    limits.note(DOCKER_HUB, PUBLIC, "GET", 404, NOTHING)
    assert not any(is_refused(limits) for _ in range(3))


def test_head_neither_begins_nor_ends_a_refusal(limits: RateLimits) -> None:
    limits.note(DOCKER_HUB, PUBLIC, "HEAD", 429, FIELDS)
    assert not is_refused(limits)
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, NOTHING)
    limits.note(DOCKER_HUB, PUBLIC, "HEAD", 200, FIELDS)
    assert is_refused(limits)
    assert limits.get(DOCKER_HUB).remaining == 34


def test_when_the_window_turns(limits: RateLimits, clock: Clock) -> None:
    """Registries do not say when. The number of pulls that are left can only rise when it does."""

    def note(remaining: int) -> RateLimit:
        headers = Headers([("ratelimit-limit", "100;w=600"), ("ratelimit-remaining", f"{remaining};w=600")])
        limits.note(DOCKER_HUB, PUBLIC, "GET", 200, headers)
        return limits.get(DOCKER_HUB)

    assert RateLimit().turns_at(clock.now) is None
    assert note(90).turns_at(clock.now) == NOW + 600
    clock.now += 100
    assert note(80).turns_at(clock.now) == NOW + 600
    clock.now += 100
    assert note(99).turns_at(clock.now) == NOW + 800  # another one has begun
    clock.now += 700
    assert note(80).turns_at(clock.now) == NOW + 1500
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("Retry-After", "60")]))
    assert limits.get(DOCKER_HUB).turns_at(clock.now) == clock.now + 60


def test_the_reserve_is_rounded_up() -> None:
    assert [RateLimit(limit).reserved(20) for limit in (None, 5, 6, 100)] == [0, 1, 2, 20]
    assert RateLimit(100).reserved(0) == 0


def test_a_login_of_the_administrators_has_a_record(tmp_path: Path, limits: RateLimits, clock: Clock) -> None:
    """It serves many clients, in all processes. A client that logs in itself is not told to."""
    limits.note(DOCKER_HUB, "login:abc", "GET", 429, Headers([("Retry-After", "600"), *FIELDS]), "deploy")
    assert not is_refused(limits)
    other = RateLimits(Records(tmp_path / "records"), clock)
    assert is_refused(other, identity="login:abc")
    ((registry, limit),) = stored_limits(Records(tmp_path / "records"), NOW)
    assert (registry, limit.login) == (DOCKER_HUB, "deploy")
    assert "raises the limit" not in limit.describe(DOCKER_HUB)


def test_a_clients_login_has_a_limit_of_its_own(limits: RateLimits) -> None:
    limits.note(DOCKER_HUB, "own:alice", "GET", 429, NOTHING)
    assert is_refused(limits, identity="own:alice")
    assert not is_refused(limits) and not is_refused(limits, identity="own:bob")


def test_other_processes_and_a_restart_know_a_refusal(tmp_path: Path, limits: RateLimits, clock: Clock) -> None:
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("Retry-After", "600"), *FIELDS]))
    other = RateLimits(Records(tmp_path / "records"), clock)
    assert is_refused(other)
    assert other.get(DOCKER_HUB).remaining == 34
    clock.now += 601
    assert not is_refused(other)
    assert is_refused(limits)  # while the other asks
    other.note(DOCKER_HUB, PUBLIC, "GET", 200, NOTHING)
    assert not is_refused(limits)


@pytest.mark.parametrize(
    "record",
    [
        {"refused_until": NOW + 86400.0},  # by a clock that was wrong
        {"refused_until": "tomorrow"},
        {"refused_until": None},
        {"unknown": 1},
        {},
    ],
)
def test_odd_records_refuse_nothing(tmp_path: Path, limits: RateLimits, record: dict[str, object]) -> None:
    Records(tmp_path / "records").put(record, LIMIT, str(DOCKER_HUB.host))
    assert not is_refused(limits)
    limits.note(DOCKER_HUB, PUBLIC, "GET", 200, FIELDS)
    assert limits.get(DOCKER_HUB).remaining == 34


def test_a_clock_that_was_years_ahead(tmp_path: Path, limits: RateLimits, clock: Clock) -> None:
    """A machine without a clock of its own has one, until it hears of the time. Its records are of the future."""
    clock.now += 20 * 365 * 86400
    limits.note(DOCKER_HUB, PUBLIC, "GET", 429, Headers([("Retry-After", "600"), *FIELDS]))
    clock.now = NOW
    records = Records(tmp_path / "records")
    ((_, stored),) = stored_limits(records, NOW)
    for process in (limits, RateLimits(records, clock)):
        for limit in (process.get(DOCKER_HUB), stored):
            assert (limit.refused_until, limit.since, limit.seen) == (NOW, NOW, NOW)
            assert limit.turns_at(NOW) == NOW + 21600
    clock.now += 1
    limits.note(DOCKER_HUB, PUBLIC, "HEAD", 200, Headers([("ratelimit-remaining", "33;w=21600")]))
    clock.now += 1
    limits.note(DOCKER_HUB, PUBLIC, "HEAD", 200, Headers([("ratelimit-remaining", "32;w=21600")]))
    assert limits.get(DOCKER_HUB).remaining == 32
    assert not is_refused(RateLimits(records, clock)) and is_refused(limits)  # while one process asks
    limits.note(DOCKER_HUB, PUBLIC, "GET", 200, NOTHING)
    clock.now += 20 * 365 * 86400
    assert not is_refused(limits)


def test_a_limit_without_impossible_times_is_as_it_was() -> None:
    limit = RateLimit(100, 21600, 34, seen=NOW, refused_until=NOW + 7200, since=NOW)
    assert limit.plausible_at(NOW) is limit
    assert limit.plausible_at(NOW - 1).refused_until == NOW - 1


def test_each_pull_is_recorded_but_not_each_head(tmp_path: Path, limits: RateLimits, clock: Clock) -> None:
    """Registries count few pulls, and the other processes know them at once. HEAD is sent for each request of a tag."""
    path = tmp_path / "records" / LIMIT
    contents = set()
    for remaining in range(20):
        limits.note(DOCKER_HUB, PUBLIC, "HEAD", 200, Headers([("ratelimit-remaining", f"{99 - remaining};w=21600")]))
        contents |= {file.read_bytes() for file in path.iterdir()}
        clock.now += 1
    assert len(contents) == 1
    assert limits.get(DOCKER_HUB).remaining == 80
    limits.note(DOCKER_HUB, PUBLIC, "GET", 200, Headers([("ratelimit-remaining", "79;w=21600")]))
    assert RateLimits(Records(tmp_path / "records"), clock).get(DOCKER_HUB).remaining == 79
