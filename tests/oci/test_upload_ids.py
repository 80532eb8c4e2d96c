"""Identifiers of upload sessions: what they say, and that nobody else can make one."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.names import parse_repository
from dockerproxy.oci.routes import Kind, route
from dockerproxy.oci.upload_ids import UPLOAD_ID, UploadIds, UploadOffer, owner_of, repository_of, started_at

IDS = UploadIds(b"secret")
APP, OTHER = parse_repository("team/app"), parse_repository("team/other")
NOW = 1_800_000_000.5


def test_an_offer_is_read_by_every_process() -> None:
    offer = IDS.make_offer("alice", APP, "sha512", NOW)
    assert UploadIds(b"secret").read_offer(offer, APP, NOW) == UploadOffer(offer[:36], "sha512")
    assert route(f"/v2/{APP}/blobs/uploads/{offer}").kind is Kind.UPLOAD
    assert uuid.UUID(offer[:36]).version == 8
    assert started_at(offer[:36]) == int(NOW)


@pytest.mark.parametrize(("age", "valid"), [(0, True), (-200, True), (3599, True), (3601, False), (-400, False)])
def test_an_offer_ends(age: float, valid: bool) -> None:
    offer = IDS.make_offer("alice", APP, "sha256", NOW)
    assert (IDS.read_offer(offer, APP, NOW + age) is not None) is valid


def test_an_offer_is_for_one_repository_and_one_registry() -> None:
    offer = IDS.make_offer("alice", APP, "sha256", NOW)
    assert IDS.read_offer(offer, OTHER, NOW) is None
    assert UploadIds(b"another").read_offer(offer, APP, NOW) is None
    assert IDS.is_of(offer[:36], APP) and not IDS.is_of(offer[:36], OTHER)


@given(st.integers(0, 75), st.characters(codec="ascii"))
def test_an_altered_offer_is_none(position: int, character: str) -> None:
    offer = IDS.make_offer("alice", APP, "sha256", NOW)
    altered = offer[:position] + character + offer[position + 1 :]
    assert IDS.read_offer(altered, APP, NOW) is None or altered == offer


@given(st.text(max_size=120))
def test_any_text_is_read_or_refused(text: str) -> None:
    assert IDS.read_offer(text, APP, NOW) is None


def test_identifiers_tell_owners_and_repositories_apart() -> None:
    ids = {
        (owner, repository): [IDS.make_offer(owner, repository, "sha256", NOW)[:36] for _ in range(3)]
        for owner in ("alice", "bob") for repository in (APP, OTHER)
    }  # fmt: skip
    assert len({upload_id for group in ids.values() for upload_id in group}) == 12
    assert all(UPLOAD_ID.fullmatch(upload_id) for group in ids.values() for upload_id in group)
    for (owner, repository), group in ids.items():
        for (other_owner, other_repository), others in ids.items():
            assert ({*map(owner_of, group)} == {*map(owner_of, others)}) is (owner == other_owner)
            assert ({*map(repository_of, group)} == {*map(repository_of, others)}) is (repository == other_repository)
