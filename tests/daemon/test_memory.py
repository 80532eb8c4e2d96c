from __future__ import annotations

import gc

import pytest

from dockerproxy.daemon.memory import settle_memory


def test_what_the_start_made_is_not_looked_at_again(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(gc.unfreeze)
    mine = [object()]
    settle_memory()
    assert gc.get_freeze_count() > 1000
    assert not any(known is mine for known in gc.get_objects())
    later = [mine]
    assert any(known is later for known in gc.get_objects())
