"""The client set-up script (setup.sh), which ``curl http://HOST/setup | sudo sh`` runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_TOKENS
from dockerproxy.oci.names import Host

DOCKER_HUB_HOSTS = (DOCKER_HUB.host.name, DOCKER_HUB_TOKENS.host.name)

_TEMPLATE = Path(__file__).with_name("setup.sh").read_text(encoding="utf-8")


def setup_script(
    proxy_url: str, registries: Iterable[str] = DOCKER_HUB_HOSTS, hosted: str = "docker-registry.local"
) -> str:
    """Return a POSIX shell script that configures a host's container engines to use a proxy and to trust its CA.

    `registries` are the hosts that must not be reached without the proxy, and `hosted` is the name of its own registry.

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
    values = {
        "@PROXY@": f"http://{host.authority}/",
        "@REGISTRIES@": " ".join(registries),
        "@HOSTED@": hosted,
    }
    script = _TEMPLATE
    for name, value in values.items():
        script = script.replace(name, shlex.quote(value))
    return script
