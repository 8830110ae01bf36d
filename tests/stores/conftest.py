"""A fixture for all tests of stores: no lease outlives its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fluxibly import _threads
from fluxibly.stores._leases import Leases


@pytest.fixture(autouse=True)
def _no_lease_is_left() -> Iterator[None]:
    """Otherwise, the thread of a store that was not collected yet would report, in another test, that its server is gone."""
    yield
    for owner in [*_threads._locked]:
        if isinstance(owner, Leases):
            owner._held.clear()
