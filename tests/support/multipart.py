"""The parts of a multipart/byteranges response (RFC 9110, section 14.6)."""

from __future__ import annotations


def split_byteranges(content_type: str, body: bytes) -> list[tuple[dict[str, str], bytes]]:
    """Return the fields, with names and values in lower case, and the bytes of each part, in their order."""
    media_type, _, boundary = content_type.partition("; boundary=")
    assert media_type == "multipart/byteranges"
    first, *parts, last = (b"\r\n" + body).split(f"\r\n--{boundary}".encode())
    assert (first, last) == (b"", b"--\r\n")
    received = []
    for part in parts:
        head, _, data = part.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(": ") for line in head.decode().split("\r\n")[1:])
        received.append((fields, data))
    return received
