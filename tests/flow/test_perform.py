"""Mistakes in what `perform` and `sleep` are given: each is an error in every mode, and no coroutine is left behind."""

from __future__ import annotations

import asyncio
import warnings
from functools import partial
from types import coroutine

import pytest

from fluxibly.errors import StreamInterrupted
from fluxibly.flow import perform, sleep
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, check_middleware
from fluxibly.testing.modes import run
from fluxibly.types import Request

REQUEST = Request(model="m", messages="hi")


@pytest.fixture(autouse=True)
def _no_coroutine_is_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scripted(mode):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)("fine")


def outcome(mode, *arguments, after_output=False):
    """Return what a middleware gets from `perform(*arguments)`, or the error of the call."""
    got = []

    def guard(request, call_next):
        if after_output:
            yield from call_next(request)
        got.append((yield from perform(*arguments)))
        return (yield from call_next(request))

    ran = run(mode, scripted(mode), [guard], REQUEST)
    return got[0] if got else ran.error


async def acheck(number=5):
    return number


def check(number=5):
    return number


def lazy():
    yield 5


async def alazy():
    yield 5


class AsyncCheck:
    async def __call__(self):
        return 5

    async def check(self):
        return 5


class Pending:
    def __await__(self):
        yield from ()
        return 5


@pytest.mark.parametrize("acall", [None, acheck], ids=["alone", "twice"])
@pytest.mark.parametrize(
    ("call", "got"),
    [
        (acheck, "the async function acheck"),
        (partial(acheck, 3), "the async function acheck"),
        (partial(partial(acheck), 3), "the async function acheck"),
        (AsyncCheck(), "the async function AsyncCheck"),
        (AsyncCheck().check, "the async function AsyncCheck.check"),
        (lazy, "the generator function lazy"),
        (alazy, "the async generator function alazy"),
    ],
    ids=["function", "partial", "partials", "object", "method", "generator", "async generator"],
)
def test_a_function_that_is_not_sync(mode, call, acall, got):
    """An async function in the first place is refused in every mode, also where the driver would not run it."""
    error = outcome(mode, call, acall)
    assert isinstance(error, TypeError)
    assert str(error) == (
        f"perform: expected a sync function first, got {got}; write perform(call, acall): the sync function first, the "
        "async one second; in a program without sync calls, perform(None, acall)"
    )


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda: acheck(), "a coroutine"),  # noqa: PLW0108  # a lambda hides that the function is async
        (lambda: lazy(), "a generator"),  # noqa: PLW0108  # as above
        (lambda: alazy(), "an async_generator"),  # noqa: PLW0108  # as above
        (Pending, "a Pending"),
    ],
    ids=["coroutine", "generator", "async generator", "awaitable"],
)
def test_a_result_that_is_none_yet(mode, call, got):
    """Functions that cannot be seen to be async are found by what they return."""
    error = outcome(mode, call)
    assert isinstance(error, TypeError)
    assert f", which returned {got}; write perform(call, acall)" in str(error)


@pytest.mark.parametrize("arguments", [lambda: (acheck(),), lambda: (check, acheck()), lambda: (None, acheck())])
def test_a_coroutine_instead_of_a_function(mode, arguments):
    """A function that was called by mistake is refused in every mode."""
    error = outcome(mode, *arguments())
    assert isinstance(error, TypeError)
    assert str(error).startswith("perform: expected a function, got a coroutine; write perform(call, acall)")


def test_nothing(mode):
    """`perform` needs a function."""
    error = outcome(mode, None)
    assert str(error).startswith("perform: expected a function, got None; write perform(call, acall)")


def test_an_async_half_that_is_not_async(mode):
    """Only an async driver runs the second function."""
    error = outcome(mode, check, check)
    if mode.backend is None:
        assert error == 5
    else:
        assert isinstance(error, TypeError)
        assert str(error).startswith("perform: expected an async function second, got check, which returned an int; ")


def test_an_async_half_that_returns_a_coroutine(mode):
    """An async function that forgot its own `await` has no result either."""

    async def forgetful():
        return acheck()

    error = outcome(mode, check, forgetful)
    if mode.backend is None:
        assert error == 5
    else:
        assert "forgetful, which returned a coroutine; write" in str(error)


def test_only_an_async_function(mode):
    """A middleware of an async program passes None in the first place; a sync pipeline refuses it."""
    got = outcome(mode, None, acheck)
    if mode.backend is None:
        assert isinstance(got, TypeError)
        assert str(got) == (
            "perform: expected a sync function for a sync pipeline, got only the async acheck; write perform(call, "
            "acall), or use an async pipeline"
        )
    else:
        assert got == 5


@coroutine
def old_style():
    yield from ()
    return 5


@pytest.mark.parametrize("acall", [partial(acheck, 5), AsyncCheck(), lambda: acheck(), Pending, old_style])  # noqa: PLW0108  # as above
def test_what_the_async_half_may_be(mode, acall):
    """Whatever returns an awaitable may be the second function."""
    assert outcome(mode, check, acall) == 5


@pytest.mark.parametrize("value", [None, 0, "text", [1], iter([1]), {}, asyncio.CancelledError])
def test_values(mode, value):
    """Any value is a result, an iterator too."""
    assert outcome(mode, lambda: value) is value


def test_a_mistake_after_output(mode):
    """After output, the error is the cause of `StreamInterrupted`."""
    error = outcome(mode, acheck, after_output=True)
    if mode.streaming:
        assert isinstance(error, StreamInterrupted)
        error = error.__cause__
    assert "got the async function acheck" in str(error)


def test_sleep_of_a_coroutine(mode):
    """A coroutine is no number, and it is closed."""

    def tired(request, call_next):
        yield from sleep(acheck())
        return (yield from call_next(request))

    error = run(mode, scripted(mode), [tired], REQUEST).error
    assert isinstance(error, TypeError)
    assert str(error) == "sleep: expected a number of seconds from 0 up, got a coroutine"


def test_check_middleware_says_it():
    """`check_middleware` reports the mistake, though all modes agree on it."""

    def guard(request, call_next):
        yield from perform(acheck)
        return (yield from call_next(request))

    with pytest.raises(
        AssertionError, match=r"the middleware .*guard: perform: expected a sync function first, got the async"
    ):
        check_middleware(guard)

    def early(request, call_next):
        yield from sleep(-1)
        return (yield from call_next(request))

    with pytest.raises(AssertionError, match=r"the middleware .*early: sleep: expected a number of seconds from 0 up"):
        check_middleware(early)
