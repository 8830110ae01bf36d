"""What the tests of streams share: a request, a middleware that notes how a stream ended, and all the texts of one."""

from __future__ import annotations

from fluxibly.types import Request

REQUEST = Request(model="m", messages="hi")
BACKENDS = ("asyncio", "trio")


class Watch:
    """A middleware that notes how each call ends."""

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
