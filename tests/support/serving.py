"""ASGI applications behind a real uvicorn, in a thread of this process, and a provider whose streams never end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fluxibly.types import Chunk, ProviderInfo, Request, Response


class Switch:
    """An ASGI application that is another one, at each time."""

    def __init__(self) -> None:
        self.now: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self.now(scope, receive, send)


_shared: list[tuple[Switch, str]] = []
"""The server that tests share while `sharing` is entered: to start and end one takes half a second."""


@contextmanager
def sharing() -> Iterator[None]:
    """Start a server that `served` uses from now on."""
    switch = Switch()
    with served(switch, lifespan="off") as url:
        _shared.append((switch, url))
        try:
            yield
        finally:
            _shared.clear()


@contextmanager
def served(application: Any, *, lifespan: Any = "auto", alone: bool = False) -> Iterator[str]:
    """Serve an ASGI application. The value is its address, without a path. `alone` does not use the shared server."""
    if _shared and not alone:
        switch, url = _shared[0]
        switch.now = application
        yield url
        return
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        application,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not thread.is_alive()


class Endless:
    """An async provider that says `first`, and then nothing, until its stream is closed."""

    info = ProviderInfo(name="Endless", framework="endless", telemetry_name="endless")

    def __init__(self, *first: str | Chunk) -> None:
        self.first = first
        self.opened = threading.Event()
        self.closed = threading.Event()

    async def complete(self, request: Request) -> Response:
        import anyio

        self.opened.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.closed.set()
        raise AssertionError

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        import anyio

        self.opened.set()
        try:
            for piece in self.first:
                yield Chunk(piece) if isinstance(piece, str) else piece
            await anyio.sleep_forever()
        finally:
            self.closed.set()


class Outcomes:
    """A middleware that notes how each call ended: the class of the exception, or "completed"."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, request: Request, call_next: Callable[[Request], Any]) -> Any:
        from fluxibly.errors import outcome_of

        try:
            response = yield from call_next(request)
        except BaseException as error:
            self.seen.append(outcome_of(error))
            raise
        self.seen.append("completed")
        return response

    def within(self, seconds: float) -> list[str]:
        """Return the outcomes, once there are any."""
        end = time.monotonic() + seconds
        while not self.seen and time.monotonic() < end:
            time.sleep(0.005)
        return self.seen
