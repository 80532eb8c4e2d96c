"""The fields of a response that limit web browsers. They are rendered once, because every response has them.

Most of what this daemon sends comes from others: a manifest from whoever pushed it, an error from an upstream registry.
A browser must not show any of it as a page, and no other site may embed it.
"""

from __future__ import annotations


def security_fields(content_security_policy: str) -> str:
    """Return the rendered fields with this policy: lines, each with its CR LF."""
    return (
        "X-Content-Type-Options: nosniff\r\n"
        f"Content-Security-Policy: {content_security_policy}\r\n"
        "Cross-Origin-Resource-Policy: same-origin\r\n"
    )


SECURITY_FIELDS = security_fields("sandbox; default-src 'none'; frame-ancestors 'none'")
"""For everything that is not a web page of our own: no script runs, nothing is loaded, no page embeds it."""
