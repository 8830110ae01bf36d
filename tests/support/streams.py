"""Helpers for the tests of streams: a request, a middleware that records how a stream ends, and a stream's texts."""

from __future__ import annotations

from fluxibly.types import Request

REQUEST = Request(model="m", messages="hi")
BACKENDS = ("asyncio", "trio")


class Watch:
    """A middleware that records how each call ends."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def __call__(self, request, call_next):
        how = "returned"
        try:
            return (yield from call_next(request))
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            self.ends.append(how)


def texts(stream):
    return [chunk.text for chunk in stream]
