"""Errors: the defaults of their classes, and copies across a process boundary."""

from __future__ import annotations

import asyncio
import copy
import pickle

import pytest

from fluxibly import errors
from fluxibly.errors import (
    ConfigError,
    FluxiblyError,
    FrameworkNotRegistered,
    ProviderError,
    RequestTimeout,
    ResponseInvalid,
    ServerError,
    StreamInterrupted,
    StreamStalled,
    error_type,
    outcome_of,
    root_cause,
)
from fluxibly.types import Response

PROVIDER_ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ProviderError)]
RETRYABLE = {
    "RateLimitError",
    "ServerError",
    "Overloaded",
    "ConnectionFailed",
    "RequestTimeout",
    "StreamStalled",
    "StreamProtocolError",
}


def test_what_is_retryable():
    """The class decides whether an error is retryable, unless the code that raises it says otherwise."""
    assert {kind.__name__ for kind in PROVIDER_ERRORS if kind("x").retryable} == RETRYABLE
    assert ProviderError("x", retryable=True).retryable
    assert not ServerError("x", retryable=False).retryable


def test_roots():
    """All errors are FluxiblyErrors, and some are also errors of the standard library."""
    mine = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(kind, FluxiblyError) for kind in mine)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(FrameworkNotRegistered, ValueError)
    assert issubclass(RequestTimeout, TimeoutError)
    assert issubclass(StreamStalled, RequestTimeout)


def pickled(error):
    return pickle.loads(pickle.dumps(error))  # noqa: S301  # the test's own bytes


@pytest.mark.parametrize("kind", PROVIDER_ERRORS)
@pytest.mark.parametrize("through", [copy.copy, pickled])
def test_provider_errors_can_be_copied(kind, through):
    """A copy of a provider error keeps all attributes."""
    error = kind("down", retry_after=2.0, status=503, code="c", provider="p", model="m", request_id="r", body="b")
    again = through(error)
    assert type(again) is kind
    assert str(again) == "down"
    assert vars(again) == vars(error)


def test_others_can_be_copied():
    """A copy of an error with its own arguments keeps them."""
    interrupted = pickled(StreamInterrupted("cut", partial=Response("half")))
    assert (str(interrupted), interrupted.partial.text) == ("cut", "half")
    invalid = pickled(ResponseInvalid("bad", response=Response("x"), problem="p"))
    assert (str(invalid), invalid.response.text, invalid.problem) == ("bad", "x", "p")
    config = pickled(ConfigError("two", problems=("a", "b")))
    assert (str(config), config.problems) == ("two", ("a", "b"))


def test_defaults_of_messages():
    """By default the message is the problem of a ConfigError and of a ResponseInvalid."""
    assert ConfigError("bad").problems == ("bad",)
    assert ResponseInvalid("bad", response=Response()).problem == "bad"


def test_root_cause():
    """The root cause is the error behind all interruptions; an interruption without a cause is its own root cause."""
    cause = ServerError("down")
    inner = StreamInterrupted("x", partial=Response())
    inner.__cause__ = cause
    outer = StreamInterrupted("y", partial=Response())
    outer.__cause__ = inner
    assert root_cause(outer) is cause
    assert root_cause(cause) is cause
    alone = StreamInterrupted("z", partial=Response())
    assert root_cause(alone) is alone
    other = LookupError()
    other.__cause__ = cause
    assert root_cause(other) is other


def behind(*kinds):
    """Return an error of the last kind behind those before it."""
    *outer, error = [
        StreamInterrupted("x", partial=Response()) if kind is StreamInterrupted else kind() for kind in kinds
    ]
    for each in reversed(outer):
        each.__cause__, error = error, each
    return error


class Cancelled(BaseException):
    """What trio calls its cancellation."""


@pytest.mark.parametrize(
    ("error", "outcome", "name"),
    [
        (ServerError(), "failed", "ServerError"),
        (RequestTimeout(), "failed", "RequestTimeout"),
        (LookupError(), "failed", "LookupError"),
        (StreamStalled(), "stalled", "StreamStalled"),
        (behind(StreamInterrupted, StreamStalled), "stalled", "StreamStalled"),
        (behind(StreamInterrupted, StreamInterrupted, StreamStalled), "stalled", "StreamStalled"),
        (behind(StreamInterrupted, RequestTimeout), "failed", "RequestTimeout"),
        (StreamInterrupted("x", partial=Response()), "failed", "StreamInterrupted"),
        (GeneratorExit(), "abandoned", "GeneratorExit"),
        (asyncio.CancelledError(), "cancelled", "CancelledError"),
        (Cancelled(), "cancelled", "CancelledError"),
        (KeyboardInterrupt(), "cancelled", "KeyboardInterrupt"),
    ],
    ids=repr,
)
def test_outcomes(error, outcome, name):
    """How a call ended, and the name of its error, in logs, metrics and spans alike."""
    assert outcome_of(error) == outcome
    assert error_type(error) == name


def test_a_call_without_an_error_is_completed():
    assert outcome_of(None) == "completed"
