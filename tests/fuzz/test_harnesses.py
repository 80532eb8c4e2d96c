"""Every harness on its corpus and on a few hundred mutations of it, so that the fuzzers cannot rot."""

from __future__ import annotations

import pytest

from tests.fuzz.corpus import FOLDER, mutations, seeds
from tests.fuzz.harnesses import HARNESSES

# Python warns of regular expressions that a later version may read differently.
pytestmark = pytest.mark.filterwarnings("ignore:Possible:FutureWarning")

_MUTATIONS = 300
_MAX_SEED = 8192


def test_each_harness_has_a_corpus_of_small_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(HARNESSES)
    assert all(path.stat().st_size <= _MAX_SEED for path in FOLDER.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", HARNESSES)
def test_corpus(name: str) -> None:
    for data in seeds(name):
        HARNESSES[name](data)


@pytest.mark.parametrize("name", HARNESSES)
def test_mutations(name: str) -> None:
    for data in mutations(name, _MUTATIONS):
        try:
            HARNESSES[name](data)
        except Exception as error:
            error.add_note(f"the input was {data!r}; save it in {FOLDER / name}")
            raise
