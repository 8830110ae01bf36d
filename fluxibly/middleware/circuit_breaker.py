"""Middleware that stops asking a provider that fails."""

from __future__ import annotations

import attrs

from fluxibly._checks import number, one_of, validator, whole
from fluxibly._logs import log_decision
from fluxibly.errors import (
    REFUSALS,
    CircuitOpen,
    ConnectionFailed,
    DeadlineExceeded,
    ProviderError,
    RequestTimeout,
    ServerError,
    StreamProtocolError,
    error_type,
    root_cause,
)
from fluxibly.flow import CallNext, Flow, provider_of
from fluxibly.middleware._keys import By, check_by, name_of, to_by
from fluxibly.middleware._shared import ON_STORE_ERROR, OnStoreError, Shared, new_name, run_later
from fluxibly.stores import Entry, Store, to_store
from fluxibly.types import CallRecord, ProviderInfo, Request, Response

FAILURES = (ServerError, ConnectionFailed, RequestTimeout, StreamProtocolError)
"""The errors that say that a provider is down, and not that this request is wrong."""
_REMEMBERED = 86_400.0
"""The seconds after which a circuit that nobody asked for is closed again without a probe."""


@attrs.frozen(kw_only=True, eq=False)
class CircuitBreaker:
    """Middleware that stops asking a provider that fails, and asks it again after a while.

    The circuit is closed at first, and every call passes. `failures` failures within `within` seconds open it: for
    `open_for` seconds calls are refused before anything is sent. Then it is half-open: `probes` calls pass at a time. The
    first of them that succeeds closes it, and one that fails opens it again.

    ServerError (so Overloaded too), ConnectionFailed, RequestTimeout and StreamProtocolError are failures, also where they
    interrupt a stream. Every other `ProviderError` is a success: the provider has answered. A call that was abandoned or
    cancelled, or that lost a race, is neither, and gives the place of its probe back. If the deadline of the call passes,
    that is a failure of a provider that had at least half of the call's time, and else neither.

    Args:
        failures: the number of failures that open the circuit, from 1 up. Calls that succeed in between change nothing, so
            choose more where many calls run.
        within: the seconds in which they must come.
        open_for: the seconds that the circuit stays open.
        probes: the most calls at once while it is half-open, from 1 up.
        by: what has a circuit of its own: "provider", "provider and model" (the default), or what a function of the request
            returns.
        store: where the state is: "memory" (the default: each instance has its own), or a `fluxibly.stores.Store`.
        on_store_error: what happens when the store fails: "local" keeps the state in this process until it works again,
            "raise" raises `StoreError`, "open" lets calls pass.

    Raises:
        CircuitOpen: the circuit is open, or half-open with its probes under way. `retry_after` is the seconds until it may
            be tried again, as far as that is known.
    """

    failures: int = attrs.field(default=5, validator=validator(whole, 1))
    within: float = attrs.field(default=30.0, validator=validator(number, above=0))
    open_for: float = attrs.field(default=30.0, validator=validator(number, above=0))
    probes: int = attrs.field(default=1, validator=validator(whole, 1))
    by: By = attrs.field(default="provider and model", converter=to_by, validator=validator(check_by))
    store: Store = attrs.field(default=None, converter=to_store)
    on_store_error: OnStoreError = attrs.field(default="local", validator=validator(one_of, ON_STORE_ERROR))
    _shared: Shared = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_shared", Shared(self.store, self.on_store_error, "CircuitBreaker"))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call, shared = request.call, self._shared
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        key = f"circuit {name_of(info, request, self.by)}"
        opened: Entry | None
        if shared.local:
            opened = shared.store.load(key, call.clock())
        else:
            opened = yield from shared.ask(call, "load", key)
        if opened is not None:
            return (yield from self._half_open(request, call_next, info, key, opened))
        began = call.clock()
        try:
            return (yield from call_next(request))
        except Exception as error:
            if _is_failure(error, call, began):
                yield from self._count(request, info, key, error)
            raise

    def _count(self, request: Request, info: ProviderInfo, key: str, error: Exception) -> Flow[None]:
        call, shared = request.call, self._shared
        count = yield from shared.ask(call, "add", key, 1.0, self.within)
        # Calls that were under way when the circuit opened do not keep it open for longer.
        if count >= self.failures and (yield from shared.ask(call, "load", key)) is None:
            yield from self._open(request, info, key, error, f"{self.failures} failures within {self.within:g} s")

    def _open(self, request: Request, info: ProviderInfo, key: str, error: Exception, why: str) -> Flow[None]:
        yield from self._shared.ask(request.call, "save", key, b"open", self.open_for + _REMEMBERED)
        what = f"opens the circuit of {request.model} at {info.name} for {self.open_for:g} s: {why}"
        log_decision(request, "CircuitBreaker", what, error)

    def _half_open(
        self, request: Request, call_next: CallNext, info: ProviderInfo, key: str, opened: Entry
    ) -> Flow[Response]:
        left = opened.left - _REMEMBERED
        if left > 0:
            raise self._refusal(request, info, f"is open for {left:.3g} s more", left)
        call, shared = request.call, self._shared
        probes, who, began = f"{key} probes", new_name(), call.clock()
        ending = None if shared.local else run_later(call, shared, lambda: [("release", probes, who)])
        try:
            busy = yield from shared.ask(call, "lease", probes, who, self.probes, wait=False)
            if busy is not None:
                raise self._refusal(request, info, f"has {self.probes} probes under way", None)
            log_decision(request, "CircuitBreaker", f"tries {request.model} at {info.name} again, with this call")
            response = yield from call_next(request)
            yield from self._close(request, info, key)
        except Exception as error:
            if _is_failure(error, call, began):
                yield from self._open(request, info, key, error, f"a probe failed with {error_type(error)}")
            elif _is_answer(error):
                yield from self._close(request, info, key)
            if ending is not None:
                yield from ending.run()
            raise
        finally:
            if ending is None:
                shared.store.release(probes, who, call.clock())
        if ending is not None:
            yield from ending.run()
        return response

    def _close(self, request: Request, info: ProviderInfo, key: str) -> Flow[None]:
        yield from self._shared.ask(request.call, "save", key, None, None)
        log_decision(request, "CircuitBreaker", f"closes the circuit of {request.model} at {info.name}")

    def _refusal(self, request: Request, info: ProviderInfo, why: str, left: float | None) -> CircuitOpen:
        log_decision(
            request, "CircuitBreaker", f"refuses the call: the circuit of {request.model} at {info.name} {why}"
        )
        return CircuitOpen(
            f"CircuitBreaker refuses a call of {request.model} at {info.name}: the circuit {why}; ask another provider, "
            "or later",
            retry_after=left,
            provider=info.framework,
            model=request.model,
        )


def _is_failure(error: Exception, call: CallRecord, began: float) -> bool:
    """Whether an error says that a provider is down, which had been asked at the time `began`."""
    cause = root_cause(error)
    if isinstance(cause, DeadlineExceeded):
        # A provider that got the rest of a call's time, after others had used most of it, has not failed.
        leash = call.leash
        if leash is None or leash.deadline is None or not call.attempts:
            return False
        return call.clock() - began >= (leash.deadline - call.started_at) / 2
    return isinstance(cause, FAILURES)


def _is_answer(error: Exception) -> bool:
    """Whether an error says that a provider is there."""
    cause = root_cause(error)
    return isinstance(cause, ProviderError) and not isinstance(cause, (*REFUSALS, DeadlineExceeded))
