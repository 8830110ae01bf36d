"""Fixtures for all tests: the async backends, calls over HTTP, and the small local model in process and behind HTTP."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from support.canned_server import Canned, canned_server

from fluxibly.testing.modes import MODES, Mode

if TYPE_CHECKING:
    from support.tiny import Caller

# In CI each run tries the same examples, because a build must not fail by chance. Elsewhere each run tries others.
# Slowness is not a failure in either.
settings.register_profile("ours", derandomize=bool(os.environ.get("CI")), deadline=None)
settings.load_profile("ours")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loop of an async test: each test runs on both."""
    return str(request.param)


@pytest.fixture(params=MODES, ids=str)
def mode(request: pytest.FixtureRequest) -> Mode:
    """A mode of calls: each test runs in all six."""
    mode: Mode = request.param
    return mode


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def stream_mode(request: pytest.FixtureRequest) -> Mode:
    """A mode of streams: each test runs in all three."""
    mode: Mode = request.param
    return mode


@pytest.fixture(scope="module")
def quick_collector() -> Iterator[None]:
    """Let the garbage collector skip all objects made so far (the libraries), for tests that run it many times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def no_proxies() -> Iterator[None]:
    """Remove the proxies from the environment, because the tests' servers are on loopback."""
    with pytest.MonkeyPatch.context() as environment:
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                environment.delenv(name)
        yield


@pytest.fixture(params=["sync", "asyncio", "trio"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """A caller of the HTTP shells: of the sync shell in threads, or of the async shell on both event loops."""
    from support.tiny import Caller

    return Caller(request.param)


@pytest.fixture
def server() -> Iterator[Canned]:
    """A service for LangChain and LiteLLM to call."""
    with canned_server() as canned:
        yield canned


@pytest.fixture
def other() -> Iterator[Canned]:
    """A second service, which LangChain or LiteLLM may fall back to."""
    with canned_server() as canned:
        yield canned


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The small model's file, which the first run downloads into the user's cache folder."""
    from fluxibly.errors import ProviderError
    from fluxibly.providers.local import model_path

    try:
        return model_path("smollm2")
    except ProviderError as error:
        pytest.skip(f"no local model: {error}")


@pytest.fixture(scope="session")
def local_server(gguf: Path) -> Iterator[str]:
    """The address, without a path, of llama.cpp's own HTTP server with the small model. It accepts any API key."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {"smollm2"}
    params.n_ctx = 2048
    params.n_parallel = 2
    params.chat_template = "chatml"
    params.verbosity = -1
    params.offline = True
    params.ui = False
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    server.handle_metrics()  # a server that is freed before its thread answers for the first time hangs
    yield server.listening_address
    del server
    gc.collect()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the end of a stream's body however slow the test is, so that its connection is reused."""
    for module in ("_pool", "_httpx"):
        monkeypatch.setattr(f"fluxibly.providers.http.{module}.DRAIN_TIME", 5.0)
