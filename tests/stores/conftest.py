"""Fixtures for tests of stores: no lease outlives its test, and a Redis server is empty when a test begins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.redis_server import RedisServer

from fluxibly import _threads
from fluxibly.stores import RedisStore
from fluxibly.stores._leases import Leases


@pytest.fixture(autouse=True)
def _no_lease_is_left() -> Iterator[None]:
    """Otherwise, the thread of a store that was not collected yet would report, in another test, that its server is gone."""
    yield
    for owner in [*_threads._locked]:
        if isinstance(owner, Leases):
            owner._held.clear()


@pytest.fixture
def url(server: RedisServer) -> str:
    """The URL of the module's server, which has been emptied."""
    with server.client() as client:
        client.flushall()
    return server.patient_url


@pytest.fixture
def store(url: str) -> Iterator[RedisStore]:
    store = RedisStore(url)
    yield store
    store.close()
