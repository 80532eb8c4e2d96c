"""Upload sessions: ranges of chunks, and hash algorithms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import BlobUploadInvalid, DigestInvalid, RangeInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.oci.uploads import algorithm_for, declared_length, range_header

SIZES = st.integers(0, 10**15)


@given(session_size=SIZES, length=st.integers(1, 10**12), has_length=st.booleans())
def test_declared_length_of_the_next_chunk(session_size: int, length: int, has_length: bool) -> None:
    assert (
        declared_length(f"{session_size}-{session_size + length - 1}", length if has_length else None, session_size)
        == length
    )


@given(session_size=SIZES, start=SIZES, length=st.integers(1, 1000))
def test_out_of_order_chunk(session_size: int, start: int, length: int) -> None:
    if start != session_size:
        with pytest.raises(RangeInvalid):
            declared_length(f"{start}-{start + length - 1}", length, session_size)


def test_a_chunk_that_ends_before_it_begins() -> None:
    with pytest.raises(RangeInvalid):
        declared_length("5-4", None, 5)


@pytest.mark.parametrize(
    "field", ["", "-", "0-", "-5", "bytes 0-5", "bytes 0-5/6", "bytes=0-5", "0-5/6", "0-5,6-7", "a-b", "0--5", "٠-٥",
              "0 - 5", "1" * 20 + "-" + "2" * 20],
)  # fmt: skip
def test_invalid_content_range(field: str) -> None:
    with pytest.raises(BlobUploadInvalid):
        declared_length(field, 6, 0)


def test_content_range_of_another_length() -> None:
    with pytest.raises(BlobUploadInvalid):
        declared_length("0-5", 5, 0)


@pytest.mark.parametrize("length", [None, 0, 7])
def test_without_content_range(length: int | None) -> None:
    assert declared_length(None, length, 100) == length


@pytest.mark.parametrize(("session_size", "field"), [(0, "0-0"), (1, "0-0"), (2, "0-1"), (10**12, f"0-{10**12 - 1}")])
def test_range_header(session_size: int, field: str) -> None:
    assert range_header(session_size) == field


def test_algorithm_for() -> None:
    sha512 = Digest.of(b"", "sha512")
    assert algorithm_for(None, None) == "sha256"
    assert algorithm_for(None, "sha512") == "sha512"
    assert algorithm_for(sha512, None) == "sha512"
    assert algorithm_for(sha512, "sha256") == "sha512"


@pytest.mark.parametrize("name", ["", "md5", "SHA256", "sha384"])
def test_unregistered_algorithm(name: str) -> None:
    with pytest.raises(DigestInvalid):
        algorithm_for(None, name)
