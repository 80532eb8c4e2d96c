from __future__ import annotations

import os
import subprocess
import sys

from dockerproxy.daemon.metrics import LOGINS, PINNED_BYTES, PINS, WORKER_REPLACEMENTS, Metrics
from dockerproxy.daemon.processes import ProcessUsage


def test_the_usage_is_the_sum_over_processes() -> None:
    """A process that has ended does not count."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        one, both = ProcessUsage.read([os.getpid()]), ProcessUsage.read([os.getpid(), process.pid])
        process.communicate(b"\n")
    after = ProcessUsage.read([os.getpid(), process.pid])
    assert one.resident > 1 << 20 and one.virtual > one.resident and 0 < one.open_files < one.max_files
    assert both.virtual > one.virtual and both.max_files == 2 * one.max_files
    assert after.max_files == one.max_files
    assert ProcessUsage.read([]) == ProcessUsage()


def test_processor_time_never_decreases() -> None:
    """A process that replaces another one begins with what that had used."""
    metrics = Metrics.make(2)
    main, worker = metrics.for_process(0), metrics.for_process(1)
    main.set_process(10, 1.5)
    worker.set_process(11, 2.0)
    assert (main.cpu_seconds, main.process_ids) == (3.5, [10, 11])
    replacement = metrics.for_process(1)
    assert (main.cpu_seconds, main.process_ids) == (3.5, [10])
    replacement.set_process(12, 0.25)
    assert (main.cpu_seconds, worker.process_ids) == (3.75, [10, 12])
    assert replacement.started_at == main.started_at == metrics.started_at


def test_logins_pins_and_replacements() -> None:
    metrics = Metrics.make(2).for_process(0)
    metrics.count_login(True)
    metrics.count_login(True)
    metrics.count_login(False)
    metrics.set_pins(3, 1, 5000)
    metrics.count_replacement()
    values = {
        (family.name, *sample.labels): sample.value
        for family in (LOGINS, PINS, PINNED_BYTES, WORKER_REPLACEMENTS)
        for sample in metrics.samples(family)
    }
    assert values == {
        ("logins_total", "accepted"): 2, ("logins_total", "refused"): 1, ("pins", "complete"): 3,
        ("pins", "incomplete"): 1, ("cache_pinned_bytes",): 5000, ("worker_replacements_total",): 1,
    }  # fmt: skip
