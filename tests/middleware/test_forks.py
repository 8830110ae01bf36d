"""Middleware whose calls share a state, in a process that is forked while another thread is in the middle of a change."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, threading
from fluxibly import Pipeline, Request
from fluxibly.middleware import *
from fluxibly.testing import ScriptedProvider

def locks(thing, seen):
    if id(thing) in seen or not type(thing).__module__.startswith("fluxibly"):
        return
    seen.add(id(thing))
    for name in (*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())):
        value = getattr(thing, name, None)
        if name == "_lock":
            yield value
        yield from locks(value, seen)

layer = LAYER
pipeline = Pipeline(ScriptedProvider(*["fine"] * 9), [layer])
request = Request(model="m", messages="Hi")
pipeline.complete(request)
found = [*locks(layer, set())]
assert found
held, over = threading.Event(), threading.Event()

def hold():
    for lock in found:
        lock.acquire()
    held.set()
    over.wait(30)

threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    os._exit(pipeline.complete(request).text != "fine")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    "layer",
    [
        "Concurrency(9)",
        "RateLimit(requests=1e6, tokens=1e9)",
        "CircuitBreaker()",
        "Retry(budget=RetryBudget())",
        "Balance(['a', 'b'])",
        "Hedge('p95')",
        "Record('/dev/null')",
        "Replay('/dev/null', missing='ask')",
        "Cache()",
        "Budget(tokens=1e9)",
    ],
)
def test_a_lock_of_another_thread(layer):
    """The new process has locks of its own, so that its calls go on."""
    script = SCRIPT.replace("LAYER", layer)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
