"""The fork server and its workers, as real processes.

Each test runs a script in a new process, because the fork server needs a process without threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # starts processes

HERE = Path(__file__).parent

_PRELUDE = """
import json, os, select, signal, socket, sys, time
from tests.workers.descriptor_reactor import DescriptorReactor
from dockerproxy.workers.fork_server import ForkServer, SpawnRequest
from twisted.logger import globalLogPublisher

reactor, events = DescriptorReactor(), []
secret = open(os.devnull)
ready, go = os.pipe()

def run(request):
    {run}

class Observer:
    def worker_started(self, number, pid):
        events.append(["started", number, pid])

    def worker_exited(self, number, reason):
        events.append(["exited", number, reason])

    def fork_server_lost(self):
        events.append(["lost"])

def begin(keep_log_observers=True):
    server = ForkServer(reactor, run, keep_log_observers=keep_log_observers)
    server.subscribe(Observer())
    server.startService()
    return server

def wait_for(count):
    while len(events) < count:
        select.select(list(reactor.readers), [], [], 60)
        reactor.iterate()

def start(server, number, changed_settings={{}}, log_fd=None):
    parent_socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with child_socket:
        server.start(SpawnRequest(number, changed_settings, child_socket.fileno(), log_fd))
    return parent_socket

def descriptors(pid):
    return sorted(int(name) for name in os.listdir(f"/proc/{{pid}}/fd"))
"""


def run_script(run: str, text: str) -> Any:
    """Run the script `text` in a new process; its workers execute `run`. Return its output, parsed as JSON."""
    prelude = _PRELUDE.format(run=run)
    completed = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", f"{prelude}\n{text}"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    return json.loads(completed.stdout)


WAIT_FOR_CLOSE = "sock = socket.socket(fileno=request.socket_fd); sock.send(b'here'); select.select([sock], [], [])"


def test_worker_gets_its_request_and_its_exit_is_reported() -> None:
    events, received = run_script(
        "socket.socket(fileno=request.socket_fd).send(json.dumps([request.number, request.changed_settings]).encode())",
        "server = begin(); sock = start(server, 3, {'A': 'b'}); wait_for(2)\n"
        "print(json.dumps([events, json.loads(sock.recv(1000))]))",
    )
    assert received == [3, {"A": "b"}]
    (started, number, pid), ended = events
    assert (started, number, pid > 1) == ("started", 3, True)
    assert ended == ["exited", 3, "exit status 0"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("raise SystemExit(1)", "exit status 1"),
        ("os._exit(7)", "exit status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
def test_exit_reason(run: str, reason: str) -> None:
    events = run_script(run, "server = begin(); sock = start(server, 1); wait_for(2); print(json.dumps(events))")
    assert events[1] == ["exited", 1, reason]


def test_several_workers() -> None:
    events = run_script(
        WAIT_FOR_CLOSE,
        "server = begin(); socks = [start(server, number) for number in (1, 2, 3)]; wait_for(3)\n"
        "for sock in socks: sock.recv(9)\n"
        "socks[1].close(); wait_for(4); socks[1] = start(server, 2); wait_for(5); socks[1].recv(9)\n"
        "for sock in socks: sock.close()\n"
        "wait_for(8); print(json.dumps(events))",
    )
    assert [entry[:2] for entry in events[:5]] == [
        ["started", 1],
        ["started", 2],
        ["started", 3],
        ["exited", 2],
        ["started", 2],
    ]
    assert sorted(entry[1] for entry in events[5:]) == [1, 2, 3]
    assert len({entry[2] for entry in events if entry[0] == "started"}) == 4


def test_descriptors_of_the_main_process_are_closed() -> None:
    """A worker that held the other end of a socket would keep it open after the main process exits."""
    server, worker = run_script(
        WAIT_FOR_CLOSE,
        "server = begin(); sock = start(server, 1); wait_for(1); sock.recv(9)\n"
        "print(json.dumps([descriptors(server._pid), descriptors(events[0][2])]))",
    )
    assert [number for number in server if number <= 2] == [0, 1, 2]
    assert len(server) == 3 + 3  # the socket to the main process, and the pipe that tells of exits
    assert len(worker) == 3 + 1


def test_worker_output_goes_to_the_log_pipe() -> None:
    text = run_script(
        "print('out'); sys.stdout.flush(); os.write(2, b'err'); globalLogPublisher({'log_format': 'unseen'})",
        "globalLogPublisher.addObserver(lambda event: event.get('log_format') and os.write(1, b'observed'))\n"
        "server = begin(keep_log_observers=False); read_fd, write_fd = os.pipe()\n"
        "sock = start(server, 1, log_fd=write_fd)\n"
        "wait_for(2); os.close(write_fd); print(json.dumps(os.read(read_fd, 1000).decode()))",
    )
    assert text == "out\nerr"


@pytest.mark.parametrize("kind", ["pipe", "socketpair"])
def test_a_worker_logs_to_the_log_of_the_main_process(kind: str) -> None:
    """Not to whatever has got the number of its descriptor, such as the connection of a client."""
    output, received, written = run_script(
        "log_stream.start_inherited_streams(DescriptorReactor())\n"
        "    pairs = [socket.socketpair() for _ in range(40)]; stream.write('a line\\n')\n"
        "    ready = select.select([one for pair in pairs for one in pair], [], [], 0)[0]\n"
        "    answer = json.dumps([one.recv(9).decode() for one in ready]).encode()\n"
        "    socket.socket(fileno=request.socket_fd).send(answer)",
        "from dockerproxy.daemon import log_stream\n"
        f"ends = os.pipe() if {kind!r} == 'pipe' else [one.detach() for one in socket.socketpair()]\n"
        "stream = log_stream.NonBlockingStream(reactor, ends[1]); stream.write('first\\n')\n"
        "server = begin(); sock = start(server, 1); wait_for(2); os.set_blocking(ends[0], False)\n"
        "print(json.dumps([os.read(ends[0], 100).decode(), json.loads(sock.recv(1000)), events[1][2]]))",
    )
    assert (output, received, written) == ("first\na line\n", [], "exit status 0")


def test_failure_of_a_worker_without_a_log_goes_to_its_pipe() -> None:
    """It would otherwise be restarted for ever, and nobody would learn why."""
    text = run_script(
        "raise RuntimeError('too early')",
        "server = begin(keep_log_observers=False); read_fd, write_fd = os.pipe()\n"
        "sock = start(server, 1, log_fd=write_fd)\n"
        "wait_for(2); os.close(write_fd); print(json.dumps(os.read(read_fd, 10000).decode()))",
    )
    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith("RuntimeError: too early\n")


def test_fork_server_exits_when_its_socket_closes() -> None:
    events, exit_status = run_script(
        WAIT_FOR_CLOSE,
        "server = begin(); sock = start(server, 1); wait_for(1); sock.recv(9)\n"
        "wait, results = os.waitpid, []; os.waitpid = lambda *args: results.append(wait(*args)) or results[-1]\n"
        "server.close()  # this calls waitpid as well, and may get the exit status\n"
        "results[-1][0] or os.waitpid(server._pid, 0); print(json.dumps([events, results[-1][1]]))",
    )
    assert ([entry[0] for entry in events], exit_status) == (["started", "lost"], 0)


def test_killed_fork_server_is_noticed() -> None:
    events, alive, reason, running = run_script(
        WAIT_FOR_CLOSE,
        "server = begin(); sock = start(server, 1); wait_for(1); sock.recv(9); os.kill(server._pid, signal.SIGKILL)\n"
        "wait_for(2)\n"
        "try:\n"
        "    server.start(SpawnRequest(2, {}, sock.fileno(), None))\n"
        "except OSError as error:\n"
        "    reason = str(error)\n"
        "print(json.dumps([events, server.alive, reason, os.path.exists(f'/proc/{events[0][2]}/exe')]))",
    )
    assert (events[1], alive, reason, running) == (["lost"], False, "the other process is gone", True)


def test_hung_worker_is_killed_with_the_main_process() -> None:
    """It would otherwise keep its connections, which nobody serves."""
    assert run_script(
        "sock = socket.socket(fileno=request.socket_fd); sock.send(b'here'); time.sleep(600)",
        "server = begin(); sock = start(server, 1); wait_for(1); sock.recv(9); server.close()\n"
        "while os.path.exists(f'/proc/{events[0][2]}/exe'): time.sleep(0.01)\n"
        "print('true')",
    )


@pytest.mark.parametrize("spare", [0, 1], ids=["no descriptor arrives", "one of two arrives"])
def test_fork_server_at_its_limit_of_open_files(spare: int) -> None:
    """The worker is reported as not started, so that the supervisor tries again, and no descriptor leaks."""
    events, server = run_script(
        WAIT_FOR_CLOSE,
        "import resource\n"
        "server = begin(); read_fd, write_fd = os.pipe(); sock = start(server, 1); wait_for(1); sock.recv(9)\n"
        "limits = resource.prlimit(server._pid, resource.RLIMIT_NOFILE)\n"
        "used = descriptors(server._pid)\n"
        f"limit = [number for number in range(100) if number not in used][{spare}]\n"
        "resource.prlimit(server._pid, resource.RLIMIT_NOFILE, (limit, limits[1]))\n"
        "start(server, 2, log_fd=write_fd); wait_for(2)\n"
        "count = len(descriptors(server._pid))\n"
        "resource.prlimit(server._pid, resource.RLIMIT_NOFILE, limits)\n"
        "other = start(server, 3, log_fd=write_fd); wait_for(3)\n"
        "print(json.dumps([events, count]))",
    )
    assert events[1] == ["exited", 2, "not started: [Errno 24] Too many open files"]
    assert events[2][:2] == ["started", 3]
    assert server == 6


def test_fork_failure_is_reported() -> None:
    events = run_script(
        WAIT_FOR_CLOSE,
        "from dockerproxy.workers import fork_server\n"
        "fork, processes = os.fork, []\n"
        "def fork_once():\n"
        "    processes.append(1)\n"
        "    if len(processes) == 2: raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "os.fork = fork_once; server = begin(); start(server, 1); wait_for(1)\n"
        "sock = start(server, 2); wait_for(2); print(json.dumps(events))",
    )
    assert events[0] == ["exited", 1, "not started: [Errno 11] Resource temporarily unavailable"]
    assert events[1][:2] == ["started", 2]


def test_simultaneous_exits_are_all_reported() -> None:
    events = run_script(
        "sock = socket.socket(fileno=request.socket_fd); sock.send(b'here'); select.select([sock], [], [])",
        "server = begin(); socks = [start(server, number) for number in range(1, 11)]; wait_for(10)\n"
        "[sock.recv(9) for sock in socks]; os.kill(server._pid, signal.SIGSTOP)\n"
        "[sock.close() for sock in socks]; time.sleep(0.3); os.kill(server._pid, signal.SIGCONT)\n"
        "wait_for(20); print(json.dumps(events))",
    )
    assert sorted(event[1] for event in events if event[0] == "exited") == list(range(1, 11))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_ignore_signals_to_the_process_group(number: int) -> None:
    events = run_script(
        f"os.kill(os.getppid(), {number:d}); os.kill(os.getpid(), {number:d})",
        "server = begin(); start(server, 1); wait_for(2); start(server, 2); wait_for(4); print(json.dumps(events))",
    )
    assert [entry[2] for entry in events if entry[0] == "exited"] == ["exit status 0"] * 2


def test_process_names() -> None:
    names = run_script(
        WAIT_FOR_CLOSE,
        "server = begin(); sock = start(server, 12); wait_for(1); sock.recv(9)\n"
        "print(json.dumps([open(f'/proc/{pid}/comm').read() for pid in (server._pid, events[0][2])]))",
    )
    assert names == ["fork server\n", "worker 12\n"]


def test_processes_have_different_random_numbers() -> None:
    """OpenSSL and Python draw different numbers in each process, although all inherit a used generator."""
    drawn = run_script(
        "sock = socket.socket(fileno=request.socket_fd); sock.send(draw().encode()); select.select([sock], [], [])",
        "from OpenSSL import SSL\n"
        "import random\n"
        "from cryptography.hazmat.primitives.asymmetric import ec\n"
        "def draw():\n"
        "    number = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value\n"
        "    return json.dumps([str(number), random.random()])\n"
        "draw(); server = begin(); socks = [start(server, number) for number in (1, 2)]; wait_for(2)\n"
        "print(json.dumps([json.loads(draw()), *(json.loads(sock.recv(1000)) for sock in socks)]))",
    )
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [3, 3]
