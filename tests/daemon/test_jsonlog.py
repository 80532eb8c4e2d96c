"""The JSON log: the contents of its lines, its robustness, and its installation under twistd."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from twisted.python.logfile import LogFile

from dockerproxy.daemon.accesslog import FIELDS
from dockerproxy.daemon.jsonlog import JsonLog, twistd_stream

PROJECT = Path(__file__).parents[2]
REACTOR: IReactorFromThreads = object()  # type: ignore[assignment]  # used only after a signal


class Unprintable:
    """An object with a failing repr()."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def log_event(**fields: Any) -> list[dict[str, Any]]:
    """Log an event of `fields`, and return the JSON objects of its lines."""
    stream = io.StringIO()
    JsonLog(stream)(fields)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def emit(format: str, namespace: str = "a.b", **fields: Any) -> dict[str, Any]:
    """Log through a `Logger`, and return the JSON object of the line."""
    stream = io.StringIO()
    Logger(namespace, observer=JsonLog(stream)).info(format, **fields)
    return dict(json.loads(stream.getvalue()))


def test_an_event_has_time_level_namespace_and_message() -> None:
    entry = emit("{n} of {total}\nsecond line", n=1, total=2)
    time = datetime.fromisoformat(entry.pop("time"))
    assert time.utcoffset() is not None
    assert abs(time.timestamp() - datetime.now().timestamp()) < 60
    assert entry == {"level": "info", "namespace": "a.b", "message": "1 of 2\nsecond line"}


def test_time_is_iso_8601_in_utc() -> None:
    (entry,) = log_event(log_format="x", log_time=1700000000.25)
    assert entry["time"] == "2023-11-14T22:13:20.250000+00:00"


def test_an_access_event_has_its_fields() -> None:
    values = ("::1", "GET", "quay.io", "/v2/", 502, 2, 0.25, "HIT", "alice", "docker/29", "no such name")
    fields = dict(zip(FIELDS, values, strict=True))
    entry = emit("{line}", "dockerproxy.access", line="the line", **fields)
    assert entry["message"] == "the line"
    assert {name: entry[name] for name in FIELDS} == fields


def test_other_fields_are_not_written() -> None:
    assert "password" not in emit("hello", password="s3cret")


def test_a_failure_has_its_traceback() -> None:
    stream = io.StringIO()
    log = Logger("a.b", observer=JsonLog(stream))
    try:
        raise KeyError("lost")
    except KeyError:
        log.failure("It went wrong")
    entry = json.loads(stream.getvalue())
    assert entry["level"] == "critical"
    assert entry["message"] == "It went wrong"
    assert "KeyError: 'lost'" in entry["traceback"]
    assert "test_jsonlog.py" in entry["traceback"]


def test_an_event_without_a_message_is_left_out() -> None:
    assert log_event(log_time=1.0) == []


@pytest.mark.parametrize("text", ["Site starting on '/run/a.sock'", "(TCP Port 3128 Closed)"])
def test_twisteds_lines_about_ports_are_left_out(text: str) -> None:
    assert log_event(log_format="{log_legacy}", log_legacy=text, message=(text,), log_time=1.0) == []
    assert len(log_event(log_format="{x}", x=text, log_time=1.0)) == 1
    assert len(log_event(log_format="{x}", x=text, message=("worker 1: " + text,), log_time=1.0)) == 1


@pytest.mark.parametrize(
    "event",
    [
        {"log_format": "{missing}", "log_time": 1.0},
        {"log_format": "{x}", "x": Unprintable(), "log_time": 1.0},
        {"log_format": 7},
        {"log_format": b"bytes \xff"},
        {"log_format": "surrogate \udc80"},
        {"log_format": "x", "log_namespace": "dockerproxy.access", "client": Path("/")},
    ],
)
def test_a_malformed_event_is_logged(event: dict[str, Any]) -> None:
    assert len(log_event(**event)) == 1


@given(st.dictionaries(st.sampled_from(["log_format", "log_time", "log_level", "log_namespace", "log_failure", "x"]),
                       st.none() | st.text() | st.floats() | st.binary() | st.builds(Unprintable)))  # fmt: skip
def test_never_raises(event: dict[str, Any]) -> None:
    log_event(**event)


def test_a_failing_stream_is_ignored() -> None:
    stream = io.StringIO()
    stream.close()
    JsonLog(stream)({"log_format": "x", "log_time": 1.0})


def test_an_ascii_stream_accepts_every_line() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    JsonLog(stream)({"log_format": "caf\u00e9 \U0001f40b"})
    assert json.loads(raw.getvalue())["message"] == "caf\u00e9 \U0001f40b"


# The stream that twistd would log to.


@pytest.mark.parametrize("logfile", [None, "-"])
def test_the_stream_is_standard_output_in_the_foreground(
    logfile: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    twistd_stream({"logfile": logfile, "nodaemon": True}, REACTOR).write("{}\n")
    assert capfd.readouterr().out == "{}\n"


def test_a_daemon_cannot_log_to_standard_output() -> None:
    with pytest.raises(SystemExit, match="cannot log to stdout"):
        twistd_stream({"logfile": "-", "nodaemon": False}, REACTOR)


def test_the_log_file_is_the_option_or_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for options, name in (({"logfile": "x.log", "nodaemon": True}, "x.log"), ({"nodaemon": False}, "twistd.log")):
        stream = twistd_stream(options, REACTOR)
        assert isinstance(stream, LogFile)
        stream.close()
        assert Path(stream.path) == tmp_path / name


# twistd itself. The service logs one access event and one failure, prints a line, and stops.

TAC = """
import sys
from twisted.application.service import Application, MultiService
from twisted.internet import reactor
from twisted.logger import Logger
from dockerproxy.daemon.accesslog import AccessLog
from dockerproxy.daemon.jsonlog import install, twistd_stream

class Top(MultiService):
    def setServiceParent(self, parent):
        install(parent, twistd_stream(OPTIONS, reactor))
        super().setServiceParent(parent)

    def startService(self):
        super().startService()
        AccessLog().record("::1", "GET", "quay.io", "/v2/?x=1", 200, 2, 0.25, "HIT")
        try:
            1 / 0
        except ZeroDivisionError:
            Logger("test").failure("divided")
        print("printed")
        reactor.callLater(0, self.rotate)

    def rotate(self):
        if OPTIONS["logfile"]:
            import os, signal
            os.kill(os.getpid(), signal.SIGUSR1)
        reactor.callLater(0, reactor.stop)

OPTIONS = {"logfile": LOGFILE, "nodaemon": True}
application = Application("t")
Top().setServiceParent(application)
"""


def run_twistd(directory: Path, logfile: str | None, *arguments: str) -> str:
    """Run twistd on the service above until it stops itself, and return its standard output."""
    (directory / "t.tac").write_text(TAC.replace("LOGFILE", repr(logfile)))
    program = "from twisted.scripts.twistd import run; run()"
    command = [sys.executable, "-c", program, "-ny", "t.tac", "--pidfile=", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check_entries(lines: list[str]) -> None:
    entries = [json.loads(line) for line in lines]
    messages = [entry["message"] for entry in entries]
    assert any("starting up" in message for message in messages)
    (access,) = (entry for entry in entries if entry["namespace"] == "dockerproxy.access")
    assert (access["path"], access["status"], access["verdict"]) == ("/v2/", 200, "HIT")
    (failure,) = (entry for entry in entries if "traceback" in entry)
    assert "ZeroDivisionError" in failure["traceback"]
    assert "printed" in messages


def test_twistd_writes_nothing_but_json_lines(tmp_path: Path) -> None:
    lines = run_twistd(tmp_path, None).splitlines()
    check_entries(lines)
    assert json.loads(lines[-1])["message"] == "Server Shut Down."


def test_twistd_uses_and_rotates_its_log_file(tmp_path: Path) -> None:
    assert run_twistd(tmp_path, "log", "--logfile=log") == ""
    check_entries([line for name in ("log.1", "log") for line in (tmp_path / name).read_text().splitlines()])


def test_a_logger_on_the_command_line_takes_precedence(tmp_path: Path) -> None:
    lines = run_twistd(tmp_path, None, "--logger=dockerproxy.daemon.textlog.observer").splitlines()
    assert any("[dockerproxy.access#info] ::1 GET quay.io/v2/ 200 2 0.250 HIT" in line for line in lines)
    assert not any(line.startswith("{") for line in lines)
