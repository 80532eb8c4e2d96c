"""The modules that a daemon may not load when it starts."""

from __future__ import annotations

UNWANTED = {
    "dockerproxy.admin.history",
    "dockerproxy.admin.image_actions",
    "dockerproxy.admin.images",
    "dockerproxy.admin.layer_places",
    "dockerproxy.admin.live",
    "dockerproxy.admin.local_overview",
    "dockerproxy.admin.pulls",
    "dockerproxy.admin.summary",
    "dockerproxy.admin.why",
    "dockerproxy.cache.image_pull",
    "dockerproxy.daemon.exposition",
    "dockerproxy.doctor.checks",
    "dockerproxy.doctor.run",
    "dockerproxy.page.charts",
    "dockerproxy.page.rendering",
    "dockerproxy.page.site",
    "dockerproxy.page.views",
    "jinja2",
    "prometheus_client",
    "rich",
    "dockerproxy.fleet",  # only with FLEET
    "botocore",
    "dockerproxy.bucket",
    "importlib.resources",
    "multiprocessing",
    "sqlite3",
    "twisted.trial",
    "twisted.web.client",
    "twisted.web.http",
    "twisted.web.server",
    "unittest",
    "xml",
}
"""Most daemons never need these modules. Each one costs memory, together with the modules that it imports, so their
first use loads them."""


def is_within(name: str, groups: set[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)
