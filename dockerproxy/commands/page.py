"""The command `page`."""

from __future__ import annotations

import argparse
import json
import socket

from dockerproxy.control_client import ControlClient
from dockerproxy.terminal import Terminal, format_window, print_line


def page(client: ControlClient, options: argparse.Namespace, terminal: Terminal) -> int:
    """Print a link that signs one browser in to the page."""
    result = client.call("POST", "/v1/sign-in-link", {})
    if terminal.as_json:
        print_line(json.dumps(result))
        return 0
    port = "" if result["port"] == 80 else f":{result['port']}"
    print_line(f"This link signs one browser in as administrator, once, within {format_window(result['seconds'])}:")
    for host in dict.fromkeys((result["host"], socket.gethostname())):
        print_line(f"  http://{host}{port}{result['path']}")
    print_line("Any other name or address of this machine does as well.")
    return 0
