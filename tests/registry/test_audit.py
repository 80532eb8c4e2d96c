from __future__ import annotations

from dockerproxy.registry.audit import MAX_REFUSALS, AuditLog
from dockerproxy.registry.principal import Principal
from tests.support.audit import make_audit_log


def test_the_values_of_an_entry() -> None:
    audit, entries = make_audit_log()
    audit.record(Principal("alice", "192.0.2.1", "docker/27"), "push", "app:1", detail="sha256:1")
    assert entries == [
        {
            "time": "2027-01-15T08:00:00Z", "user": "alice", "from": "192.0.2.1", "user_agent": "docker/27",
            "action": "push", "target": "app:1", "result": "done", "detail": "sha256:1",
        }
    ]  # fmt: skip


def test_what_clients_choose_is_bounded() -> None:
    audit, entries = make_audit_log()
    huge = "\x1b" * 100_000
    audit.record(Principal(huge, huge, huge), "push", huge, huge, huge)
    audit.record(Principal(None, "192.0.2.1", None), "push", "app:1")
    assert max(len(value) for value in entries[0].values()) == 512
    assert (entries[1]["user"], entries[1]["user_agent"], "detail" in entries[1]) == (None, None, False)


def test_what_anybody_can_cause_does_not_displace_other_entries() -> None:
    audit, entries = make_audit_log()
    for _ in range(5000):
        audit.record_refusal(Principal(None, "192.0.2.1", None), "sign-in", "the page")
    assert len(entries) == MAX_REFUSALS
    assert [entry["result"] for entry in entries] == ["refused"] * MAX_REFUSALS
    assert "access log" in entries[-1]["detail"]
    audit.record(Principal("alice", "192.0.2.1", None), "sign-in", "the page", "accepted")
    assert entries[-1]["user"] == "alice"


def test_refusals_are_recorded_again_after_an_hour() -> None:
    now, entries = [1_800_000_000.0], []
    audit = AuditLog(entries.append, lambda: now[0])
    for _ in range(MAX_REFUSALS + 1):
        audit.record_refusal(Principal(None, "192.0.2.1", None), "sign-in", "the page")
    for change in (3601.0, -7200.0):  # the clock may be set back, too
        now[0] += change
        count = len(entries)
        audit.record_refusal(Principal(None, "192.0.2.1", None), "sign-in", "the page")
        assert len(entries) == count + 1
