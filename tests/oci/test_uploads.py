from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import BlobUploadInvalid, DigestInvalid, RangeInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.oci.uploads import algorithm_for, announced, progress

SIZES = st.integers(0, 10**15)


@given(received=SIZES, length=st.integers(1, 10**12), told=st.booleans())
def test_the_next_chunk_says_how_long_it_is(received: int, length: int, told: bool) -> None:
    assert announced(f"{received}-{received + length - 1}", length if told else None, received) == length


@given(received=SIZES, start=SIZES, length=st.integers(1, 1000))
def test_no_other_chunk_is_taken(received: int, start: int, length: int) -> None:
    if start != received:
        with pytest.raises(RangeInvalid):
            announced(f"{start}-{start + length - 1}", length, received)


def test_a_chunk_that_ends_before_it_begins() -> None:
    with pytest.raises(RangeInvalid):
        announced("5-4", None, 5)


@pytest.mark.parametrize(
    "field", ["", "-", "0-", "-5", "bytes 0-5", "bytes 0-5/6", "bytes=0-5", "0-5/6", "0-5,6-7", "a-b", "0--5", "٠-٥",
              "0 - 5", "1" * 20 + "-" + "2" * 20],
)  # fmt: skip
def test_a_range_that_cannot_be_read(field: str) -> None:
    with pytest.raises(BlobUploadInvalid):
        announced(field, 6, 0)


def test_a_range_of_another_length_than_its_content() -> None:
    with pytest.raises(BlobUploadInvalid):
        announced("0-5", 5, 0)


@pytest.mark.parametrize("length", [None, 0, 7])
def test_without_a_range_it_is_what_comes(length: int | None) -> None:
    assert announced(None, length, 100) == length


@pytest.mark.parametrize(("received", "field"), [(0, "0-0"), (1, "0-0"), (2, "0-1"), (10**12, f"0-{10**12 - 1}")])
def test_progress(received: int, field: str) -> None:
    assert progress(received) == field


def test_what_to_hash_with() -> None:
    sha512 = Digest.of(b"", "sha512")
    assert algorithm_for(None, None) == "sha256"
    assert algorithm_for(None, "sha512") == "sha512"
    assert algorithm_for(sha512, None) == "sha512"
    assert algorithm_for(sha512, "sha256") == "sha512"


@pytest.mark.parametrize("name", ["", "md5", "SHA256", "sha384"])
def test_an_algorithm_that_is_not_registered(name: str) -> None:
    with pytest.raises(DigestInvalid):
        algorithm_for(None, name)
