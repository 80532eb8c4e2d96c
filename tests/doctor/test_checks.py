"""The checks of the doctor: each fact makes the finding that it should, and no stranger's text gets out of its line."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.doctor import checks
from dockerproxy.doctor.checks import (
    DiskFacts,
    LoginFacts,
    NameConstraints,
    PortFacts,
    RegistryFacts,
)
from dockerproxy.doctor.findings import BAD, OK, WARN, Diagnosis, make_report, public_report
from dockerproxy.doctor.run import lasting, merge

NOW = 1_770_000_000.0
GB = 10**9


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


# reports


def test_the_worst_is_first_and_decides() -> None:
    findings = [Diagnosis("a", "", OK, "fine"), Diagnosis("b", "", BAD, "broken"), Diagnosis("c", "", WARN, "odd")]
    report = make_report(findings, NOW, 0.5)
    assert (report["level"], [entry["check"] for entry in report["findings"]]) == (BAD, ["b", "c", "a"])
    assert make_report([], NOW, 0.0)["level"] == OK


def test_anonymous_viewers_see_public_findings_only() -> None:
    findings = [
        Diagnosis("registry", "quay.io", WARN, "quay.io answers, but", is_public=True),
        Diagnosis("clients", "", BAD, "10.0.0.7 refuses"),
    ]
    report = public_report(make_report(findings, NOW, 0.0), ["quay.io"])
    assert report["level"] == WARN
    assert "10.0.0.7" not in str(report)


@pytest.mark.parametrize("check", ["registry", "budget", "login"])
def test_anonymous_viewers_see_no_registry_that_no_setting_names(check: str) -> None:
    """A wildcard of REGISTRIES covers any number of hosts, and a registry may name any server of tokens."""
    names = ("quay.io", "secret.wild.test")
    findings = [Diagnosis(check, name, BAD, f"{name} is ill", is_public=True) for name in names]
    report = public_report(make_report(findings, NOW, 0.0), ["quay.io"])
    assert [finding["subject"] for finding in report["findings"]] == ["quay.io"]
    assert public_report(make_report(findings[1:], NOW, 0.0), ["quay.io"])["level"] == OK


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_a_report_is_printable_and_bounded(sentence: str, advice: str) -> None:
    finding = Diagnosis("registry", sentence, BAD, sentence, advice).render()
    for text in (finding["sentence"], finding["advice"], finding["subject"]):
        assert text.isprintable()
        assert len(text) <= 300


def test_the_number_of_findings_is_bounded() -> None:
    report = make_report([Diagnosis("registry", str(n), BAD, "x" * 1000, "y" * 1000) for n in range(5000)], NOW, 0.0)
    assert len(report["findings"]) == 200
    assert report["findings"][-1]["sentence"] == "4801 more findings are left out"
    assert len(str(report)) < 180 * 1024


def test_what_is_known_of_now_counts_more() -> None:
    down = Diagnosis("registry", "quay.io", BAD, "quay.io has not answered since 14:02")
    found = Diagnosis("registry", "quay.io", OK, "quay.io answers in 0.1 s")
    name = Diagnosis("name", "x", WARN, "x has no address")
    assert merge([down], [found, name]) == [down, name]
    assert merge([], [found, name]) == [found, name]
    assert lasting([found, name], 10.0) == [found, name]
    assert lasting([found, name], 60.0) == [name]
    assert lasting([found, name], 4000.0) == []


# registries, logins and the clock


def test_registries() -> None:
    facts = [
        RegistryFacts("quay.io", "connection refused"),
        RegistryFacts("ghcr.io", seconds=0.213, issuer="Sectigo"),
        RegistryFacts("page.test", problem="with a web page in place of a registry's answer"),
    ]
    findings = list(checks.check_registries(facts))
    assert levels(findings) == [BAD, OK, WARN]
    assert findings[1].sentence == "ghcr.io answers in 0.21 s; its certificate is by Sectigo"


def test_token_servers_that_are_not_intercepted() -> None:
    facts = [RegistryFacts("ghcr.io"), RegistryFacts("registry.gitlab.com", token_server="gitlab.com:443")]
    [finding] = checks.check_token_servers(facts)
    assert finding.level == OK  # public images need nothing
    assert "gitlab.com:443" in finding.sentence and "REGISTRIES" in finding.advice


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], []), ([None], []), ([0.0], [OK]), ([59.0, -59.0], [OK]), ([61.0], [WARN]), ([-299.0, None], [WARN]),
        ([301.0, 302.0], [BAD]), ([86400.0, 0.4], [OK]), ([86400.0, -90.0], [WARN]),
    ],
    ids=str,
)  # fmt: skip
def test_the_clock_is_wrong_if_no_registry_agrees(offsets: list[float | None], expected: list[str]) -> None:
    facts = [RegistryFacts(f"r{number}.test", offset=offset) for number, offset in enumerate(offsets)]
    assert levels(checks.check_clock(facts)) == expected


def test_the_clock_says_by_how_much() -> None:
    [finding] = checks.check_clock([RegistryFacts("a.test", offset=7300.0), RegistryFacts("b.test", offset=7400.0)])
    assert finding.sentence == "this machine's clock is 2 hours ahead of that of a.test and 1 more"
    [finding] = checks.check_clock([RegistryFacts("a.test", offset=-7300.0)])
    assert finding.sentence == "this machine's clock is 2 hours behind that of a.test"


def test_logins() -> None:
    logins = [
        LoginFacts("quay.io", "AUTH_REGISTRIES"),
        LoginFacts("quay.io", "AUTH_REGISTRIES", refusal="quay.io answered 401"),
        LoginFacts("quay.io", "CREDENTIAL_HELPERS", unknown="timed out"),
    ]
    findings = list(checks.check_logins(logins))
    assert levels(findings) == [OK, BAD, WARN]
    assert not any(finding.is_public for finding in findings)


# the budget


def limit(**values: Any) -> dict[str, Any]:
    defaults = {"registry": "docker.io", "limit": 100, "window": 21600, "remaining": 76, "seen": NOW - 60}
    return {**defaults, "refused_until": 0.0, **values}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [OK]), ({"remaining": 0}, [WARN]), ({"remaining": 9}, [WARN]), ({"remaining": 10}, [OK]),
        ({"remaining": None}, []), ({"remaining": 0, "seen": NOW - 30000}, []),
        ({"refused_until": NOW + 600}, [WARN]), ({"refused_until": NOW - 1, "remaining": None}, []),
        ({"limit": None, "remaining": 1, "window": None}, [OK]), ({"limit": 0, "remaining": 0}, [WARN]),
    ],
    ids=str,
)  # fmt: skip
def test_the_budget(values: dict[str, Any], expected: list[str]) -> None:
    findings = list(checks.check_budget([limit(**values)], NOW))
    assert levels(findings) == expected


# disks


@pytest.mark.parametrize(
    ("values", "level", "start"),
    [
        ({}, OK, "CACHE_DIR has 100 GB free"),
        ({"problem": "CACHE_DIR is full: no space; free space there"}, BAD, "CACHE_DIR is full: no space"),
        ({"free": 1 * GB}, WARN, "CACHE_DIR has only 1 GB free"),
        ({"free": 40 * GB, "growth": 50 * GB}, WARN, "CACHE_MAX_SIZE lets the cache grow by 50 GB"),
        ({"free_inodes": 40, "inodes": 1_000_000}, WARN, "CACHE_DIR has only 40 inodes free"),
        ({"free_inodes": 0, "inodes": 0}, OK, "CACHE_DIR has"),  # Btrfs counts none
    ],
    ids=["ok", "full", "low", "growth", "inodes", "btrfs"],
)
def test_disks(values: dict[str, Any], level: str, start: str) -> None:
    facts = {"free": 100 * GB, "size": 1000 * GB, "free_inodes": 900_000, "inodes": 1_000_000, **values}
    [finding] = checks.check_disks([DiskFacts("CACHE_DIR", **facts)])
    assert (finding.level, finding.is_public) == (level, False)
    assert finding.sentence.startswith(start)
    assert bool(finding.advice) == (level != OK)


def test_a_bucket_answers_or_says_why_not() -> None:
    problem = "REGISTRY_STORE: s3://images refuses us (AccessDenied); let the key write"
    working, failing = checks.check_disks([DiskFacts("REGISTRY_STORE"), DiskFacts("REGISTRY_STORE", problem)])
    assert (working.level, working.sentence) == (OK, "REGISTRY_STORE answers")
    assert (failing.level, failing.advice) == (BAD, "Let the key write.")


# the CA


@pytest.mark.parametrize(("days", "level"), [(3650, OK), (91, OK), (89, WARN), (31, WARN), (29, BAD), (-1, BAD)])
def test_the_end_of_the_authority(days: int, level: str) -> None:
    assert levels(checks.check_authority(NOW + days * 86400, NOW, "", "CA_DIR")) == [level]


def test_a_key_that_others_can_read() -> None:
    findings = list(checks.check_authority(NOW + 400 * 86400, NOW, "/ca/ca.key", "CA_DIR"))
    assert levels(findings) == [OK, BAD]
    assert not findings[1].is_public


@pytest.mark.parametrize(
    ("constraints", "permitted", "forbidden"),
    [
        (NameConstraints(), ["quay.io", "*.a.test", "10.0.0.1"], []),
        (NameConstraints(("docker.io",)), ["docker.io", "auth.docker.io", "10.0.0.1"], ["notdocker.io", "quay.io"]),
        (NameConstraints((".docker.io",)), ["auth.docker.io", "*.b.docker.io"], ["docker.io"]),
        (NameConstraints(None, ("quay.io",)), ["docker.io"], ["quay.io", "cdn.quay.io", "*.quay.io"]),
        (NameConstraints(("Test",)), ["a.test", "*.a.test"], ["a.example"]),
        (NameConstraints(("",)), ["anything.test"], []),
        (NameConstraints(("a.test",), (), ("10.0.0.0/8",)), ["a.test", "10.1.2.3"], ["11.0.0.1", "fd00::1"]),
        (NameConstraints(None, (), None, ("10.0.0.0/8",)), ["11.0.0.1"], ["10.1.2.3"]),
    ],
    ids=["none", "name", "below", "excluded", "case", "all", "network", "excluded-network"],
)
def test_name_constraints(constraints: NameConstraints, permitted: list[str], forbidden: list[str]) -> None:
    assert [name for name in (*permitted, *forbidden) if constraints.permits(name)] == permitted
    assert levels(checks.check_constraints([constraints], permitted)) == [OK]
    findings = list(checks.check_constraints([constraints], [*permitted, *forbidden]))
    assert levels(findings) == [BAD if forbidden else OK]
    assert all(name in findings[0].sentence for name in forbidden)
    assert list(checks.check_constraints([], permitted)) == []


@given(st.ip_addresses(), st.ip_addresses(network="10.0.0.0/8"))
def test_addresses_are_within_networks(any_address: Any, inside: Any) -> None:
    constraints = NameConstraints(permitted_networks=("10.0.0.0/8", "fd00::/8"))
    assert constraints.permits(str(inside))
    networks = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    assert constraints.permits(str(any_address)) == any(any_address in network for network in networks)


# clients, names, proxies, files


def test_clients_that_refuse_our_certificate() -> None:
    assert levels(checks.check_clients({}, NOW)) == [OK]
    [finding] = checks.check_clients({"10.0.0.7": NOW - 600, "10.0.0.8": NOW - 60}, NOW)
    assert finding.sentence == "10.0.0.8 (60 s ago), 10.0.0.7 (10 minutes ago) refuse this proxy's certificate"
    assert (finding.level, finding.is_public) == (WARN, False)
    [finding] = checks.check_clients({f"10.0.0.{n}": NOW for n in range(100)}, NOW)
    assert "and 90 more refuse" in finding.sentence


def test_the_name_of_the_hosted_registry() -> None:
    assert levels(checks.check_name("r.local", ["10.0.0.2"], [True])) == [OK]
    assert levels(checks.check_name("r.local", ["10.0.0.9", "10.0.0.2"], [False, True])) == [OK]
    [missing] = checks.check_name("r.local", [], [])
    assert "avahi" in missing.advice
    [other] = checks.check_name("r.corp", ["10.0.0.9"], [False])
    assert (missing.level, other.level) == (WARN, WARN)
    assert other.sentence == "r.corp is 10.0.0.9, which is no address of this machine"


def test_the_upstream_proxy() -> None:
    assert levels(checks.check_proxy("HTTPS_PROXY", "10.0.0.2:3128", is_own=True)) == [BAD]
    assert levels(checks.check_proxy("HTTPS_PROXY", "10.0.0.2:3128", is_own=False)) == [OK]


@pytest.mark.parametrize(
    ("used", "limit", "level"),
    [([50, 60], 65536, OK), ([10], 1024, WARN), ([54000], 65536, WARN), ([64000], 65536, BAD), ([], 65536, OK)],
    ids=str,
)
def test_descriptors(used: list[int], limit: int, level: str) -> None:
    assert levels(checks.check_descriptors(used, limit)) == [level]


def test_maintenance() -> None:
    runs = {
        "gc": {"at": NOW - 3 * 86400, "problems": 1},
        "check": {"at": NOW - 3 * 86400, "problems": 2},
        "check of the cache": {"at": NOW - 60, "problems": 0},
    }
    findings = list(checks.check_maintenance(runs, NOW))
    assert levels(findings) == [BAD, OK, WARN]
    assert findings[0].sentence == "the last check, 3 days ago, found 2 problems"
    assert list(checks.check_maintenance({}, NOW)) == []


def test_settings() -> None:
    findings = list(checks.check_settings(["X is not set."], ["A", "B"]))
    assert levels(findings) == [WARN, WARN]
    assert findings[1].sentence == "A, B in the environment file are no settings and have no effect"
    assert list(checks.check_settings([], [])) == []


def test_ports() -> None:
    ports = [
        PortFacts("PROXY_LISTEN", "127.0.0.1", 3128, is_loopback=True),
        PortFacts("PROXY_LISTEN", "", 3128, is_loopback=False, outside="10.0.0.2"),
        PortFacts("PROXY_LISTEN", "", 3128, is_loopback=False, outside="10.0.0.2", error="no answer within 3 s"),
        PortFacts("PROXY_LISTEN", "", 3128, is_loopback=False),
    ]
    assert levels(checks.check_ports(ports, behind_proxy=False)) == [WARN, OK, BAD, OK]
    assert levels(checks.check_ports(ports[:1], behind_proxy=True)) == [OK]


def test_states_of_registries() -> None:
    state = {"registry": "quay.io", "reason": "connection timed out", "since": NOW - 840, "stale": 31}
    [finding] = checks.check_states([state], NOW)
    assert finding.sentence.startswith("quay.io does not answer: connection timed out since ")
    assert finding.sentence.endswith("(14 minutes; 31 stale answers)")


def test_evictions() -> None:
    assert list(checks.check_evictions(None)) == []
    assert levels(checks.check_evictions(3600.0)) == [WARN]
    assert levels(checks.check_evictions(41 * 86400.0)) == [OK]


def test_the_members_of_a_fleet() -> None:
    assert list(checks.check_fleet({})) == []
    assert list(checks.check_fleet({"10.0.0.1:3128": "me", "10.0.0.2:3128": "up"})) == []
    [finding] = checks.check_fleet({"10.0.0.1:3128": "me", "10.0.0.2:3128": "connection refused"})
    assert finding.level == WARN and finding.sentence == "the member 10.0.0.2:3128 is down: connection refused"
    assert not finding.is_public  # addresses are nobody's business
    assert levels(checks.check_fleet({"10.0.0.2:3128": "up"})) == [WARN]


def test_wildcards_say_what_was_not_examined() -> None:
    facts = [
        checks.WildcardFacts("*.pkg.dev"),
        checks.WildcardFacts("*.azurecr.io", setting="AUTH_REGISTRIES"),
        checks.WildcardFacts("*.example.com", used=2, asked=2),
        checks.WildcardFacts("*.amazonaws.com", used=30, asked=5),
    ]
    findings = list(checks.check_wildcards(facts))
    assert [finding.sentence for finding in findings] == [
        "*.pkg.dev has not been used yet, so none of its hosts was asked",
        "*.azurecr.io has not been used yet, so none of its hosts was asked, and the login for it in AUTH_REGISTRIES"
        " was not tried",
        "*.example.com: each host that has been used was asked (2)",
        "*.amazonaws.com: 5 of the 30 hosts that have been used were asked",
    ]
    assert levels(findings) == [OK] * 4
    assert not any(finding.is_public for finding in findings)


def test_credential_helpers() -> None:
    gcr, ecr = "docker-credential-gcr", "docker-credential-ecr-login"
    failing = (("a.pkg.dev", ""), ("b.pkg.dev", "exited with the status 1: no token"), ("c.pkg.dev", "took too long"))
    facts = [
        checks.HelperFacts(gcr, "CREDENTIAL_HELPERS", ("*.pkg.dev",), failing),
        checks.HelperFacts(ecr, "DOCKER_CONFIG_FILE", ("*.amazonaws.com", "x.example")),
        checks.HelperFacts(gcr, "CREDENTIAL_HELPERS", ("gcr.io",), (("gcr.io", ""),)),
    ]
    findings = list(checks.check_helpers(facts))
    assert levels(findings) == [BAD, OK, OK]
    assert [finding.sentence for finding in findings] == [
        f"{gcr} exited with the status 1: no token, for b.pkg.dev (and 1 more)",
        f"{ecr} (DOCKER_CONFIG_FILE) was not asked yet, because no host of *.amazonaws.com, x.example has been used",
        f"{gcr} works for gcr.io",
    ]
    assert not any(finding.is_public for finding in findings)


def test_members_that_were_asked() -> None:
    facts = [
        checks.MemberFacts("10.0.0.2:3128"),
        checks.MemberFacts("10.0.0.3:3128", "Connection refused"),
        checks.MemberFacts("10.0.0.4:3128", has_same_ca=False),
    ]
    findings = list(checks.check_members(facts))
    assert [(finding.level, finding.subject) for finding in findings] == [
        (OK, "10.0.0.2:3128"), (WARN, "10.0.0.3:3128"), (BAD, "10.0.0.4:3128"),
    ]  # fmt: skip
    assert "does not answer: Connection refused" in findings[1].sentence
    assert "another CA" in findings[2].sentence
    assert not any(finding.is_public for finding in findings)


def test_a_bucket_that_ignores_conditions() -> None:
    (finding,) = checks.check_conditions(False)
    assert (finding.level, finding.subject) == (WARN, "REGISTRY_STORE")
    assert "gc" in finding.sentence and "newer version" in finding.advice
    assert levels(checks.check_conditions(True)) == [OK]


@pytest.mark.parametrize(("name", "asks"), [("docker.io", False), ("quay.io", True)])
def test_an_unknown_name_is_one_of_registries(name: str, asks: bool) -> None:
    """Docker Hub is served without an entry."""
    (finding,) = checks.check_registries([RegistryFacts(name, error="no such name, DNS returned no address")])
    assert "name server answer" in finding.advice
    assert ("REGISTRIES" in finding.advice) is asks
