"""Processes that share a Redis server: what they may do together, and what is left when one of them, or the server, dies.

What another process did is known to have happened between two times, so only what must have happened within a window counts:
no slow machine breaks a law.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from support.leftovers import eventually
from support.redis_server import RedisServer, need_redis
from support.sharing import (
    BURST,
    ENOUGH,
    PLACES,
    RATE,
    TOKENS,
    find_a_circuit_and_answer,
    forkserver,
    hold_a_place,
    in_processes,
    open_a_circuit_and_answer,
    process,
    share_a_rate,
    spend,
    wait_in_queues,
)

from fluxibly.stores import Limit, RedisStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SECONDS = 4.0


@pytest.fixture(scope="module")
def server():
    need_redis()
    server = RedisServer()
    yield server
    server.close()


def test_one_rate_for_all(url):
    """8 processes, sync and async, one of them with a wrong clock: never more than the rate and a burst, and none starves."""
    ready = forkserver().Barrier(8)
    found = in_processes(share_a_rate, *[(url, number, ready, SECONDS) for number in range(8)])
    granted = sorted(each for grants, _ in found for each in grants)
    for seconds in (0.1, 1.0, SECONDS):
        for asked, _ in granted:
            surely = [1 for since, till in granted if since >= asked and till <= asked + seconds]
            assert len(surely) <= RATE * seconds + BURST
            assert len(surely) * TOKENS <= RATE * TOKENS * (seconds + 1)
    assert len(granted) >= RATE * SECONDS / 4
    assert all(len(grants) >= 5 for grants, _ in found)
    inside = [each for _, times in found for each in times]
    assert max(sum(1 for since, till in inside if since <= at < till) for at, _ in inside) <= PLACES


def test_a_process_that_is_killed_while_it_holds_a_place(url):
    """Its place is free after its lease, and not before."""
    told = forkserver().Queue()
    store = RedisStore(url, lease_seconds=1)
    with process(hold_a_place, url, told) as holder:
        assert told.get(timeout=ENOUGH) == "held"
        for _ in range(12):
            assert store.lease("k", "next", 1, 0.0) is not None
            time.sleep(0.1)
        os.kill(holder.pid, signal.SIGKILL)
        assert eventually(lambda: store.lease("k", "next", 1, 0.0) is None, ENOUGH)
    store.release("k", "next", 0.0)
    store.close()


def test_a_process_that_is_killed_while_it_is_first_in_a_queue(url, server, store):
    """It is forgotten after a grace."""
    told = forkserver().Queue()
    limit = Limit("requests", 0.1, 1.0, 1.0)
    store.lease("k", "one", 1, 0.0)
    store.reserve("r", "one", (limit,), 0.0)
    with process(wait_in_queues, url, told) as first:
        assert told.get(timeout=ENOUGH) == "waits"
        assert store.lease("k", "next", 1, 0.0).ahead == 1
        store.release("k", "one", 0.0)
        os.kill(first.pid, signal.SIGKILL)
    store.correct("r", limit._replace(cost=-1.0), 0.0)
    assert eventually(lambda: store.lease("k", "next", 1, 0.0) is None, ENOUGH)
    with server.client() as client:
        # It was told to ask within ten seconds; those are over now.
        client.zadd("{fluxibly:r}:limits:seen", {"first": 1}, xx=True)
    assert eventually(lambda: store.reserve("r", "next", (limit,), 0.0) is None, ENOUGH)
    store.release("k", "next", 0.0)


def test_a_budget(url):
    """Four processes never spend more than there is."""
    [*spent] = in_processes(spend, *[(url, 1000)] * 4)
    assert 900 <= sum(spent) <= 1000


def test_circuits_and_answers(url):
    """A circuit that one process opens is open in another, which finds the answers of the first."""
    in_processes(open_a_circuit_and_answer, (url,))
    assert in_processes(find_a_circuit_and_answer, (url,)) == [(True, "kept", True)]
