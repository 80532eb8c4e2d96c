"""The command `doctor`."""

from __future__ import annotations

import argparse
import json

from dockerproxy.control_client import PROBLEMS, ControlClient
from dockerproxy.terminal import Terminal, print_line

_BAD = "bad"


def diagnose(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    report = client.call("GET", "/v1/doctor", None)
    status = PROBLEMS if report["level"] == _BAD else 0
    if terminal.as_json:
        print_line(json.dumps(report))
        return status
    for finding in report["findings"]:
        print_line(f"{finding['level']:<4}  {finding['sentence']}")
        if finding["advice"]:
            print_line(f"      {finding['advice']}")
    return status
