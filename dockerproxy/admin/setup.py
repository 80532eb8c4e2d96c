"""The client set-up script (setup.sh), which ``curl http://HOST/setup | sudo sh`` runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Host

_TEMPLATE = Path(__file__).with_name("setup.sh").read_text(encoding="utf-8")


def setup_script(proxy_url: str) -> str:
    """Return a POSIX shell script that configures a host's container engines to use a proxy and to trust its CA.

    `proxy_url` is ``http://host/`` or ``http://host:port/``. It is validated strictly, because it comes from a client's
    request and becomes part of a script that root runs. Raise ValueError if it is anything else.
    """
    match = re.fullmatch(r"http://([^/?#@\\\s]+)/", proxy_url)
    if match is None:
        raise ValueError(f"{proxy_url[:300]!r} is not of the form http://host:port/")
    try:
        host = Host.parse(match[1], default_port=80)
    except NameInvalid as error:
        raise ValueError(error.message) from error
    return _TEMPLATE.replace("@PROXY@", shlex.quote(f"http://{host.authority}/"))
