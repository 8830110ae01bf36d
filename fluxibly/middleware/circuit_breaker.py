"""Middleware that stops asking a provider that fails."""

from __future__ import annotations

from typing import Any

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
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._keys import By, check_by, name_of, to_by, whom
from fluxibly.middleware._shared import ON_STORE_ERROR, Later, OnStoreError, Shared, new_name
from fluxibly.stores import Entry, Store, to_store
from fluxibly.types import ProviderInfo, Request, Response

FAILURES = (ServerError, ConnectionFailed, RequestTimeout, StreamProtocolError)
"""The errors that say that a provider is down, and not that this request is wrong."""
_REMEMBERED = 86_400.0
"""The seconds after which a circuit that nobody asked for is closed again without a probe."""
_NEVER_OPENED = b""
_OPEN = b"open "
"""The beginning of the state of a circuit that is open, or half-open after a while. A name follows, new for each change."""
_CLOSED = b"closed "


class _Circuit:
    """A circuit as one call has found it."""

    state = _NEVER_OPENED

    def __init__(self, request: Request, info: ProviderInfo, key: str) -> None:
        self.request = request
        self.call = request.call
        self.info = info
        self.key = key
        self.begin()

    def begin(self) -> None:
        """Note that the provider is asked now."""
        self._began = self.call.clock()
        self._attempts = self.call.attempts

    def is_failure(self, error: Exception) -> bool:
        """Whether an error says that the provider is down."""
        cause, call = root_cause(error), self.call
        if not isinstance(cause, DeadlineExceeded):
            return isinstance(cause, FAILURES)
        if call.attempts == self._attempts:
            return False
        leash = call.leash
        if leash is None or leash.deadline is None or call.clock() < leash.deadline:
            # A deadline further in has passed, or would have passed during a wait after an error.
            return not isinstance(cause.__cause__, ProviderError) or isinstance(cause.__cause__, FAILURES)
        # A provider that got the rest of a call's time, after others had used most of it, has not failed.
        return call.clock() - self._began >= (leash.deadline - call.started_at) / 2

    def is_answer(self, error: Exception) -> bool:
        """Whether an error says that the provider is there."""
        cause = root_cause(error)
        if isinstance(cause, (*REFUSALS, DeadlineExceeded)) or self.call.attempts == self._attempts:
            return False
        return isinstance(cause, ProviderError)


def _to_store(value: Any) -> Any:
    return to_store(value, ("load", "save", "add", "lease", "release"))


@attrs.frozen(kw_only=True, eq=False)
class CircuitBreaker(Rebuilt):
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
        store: where the state is: "memory" (the default: each instance has its own), "sqlite:PATH" (a file that the
            processes of a machine share), "redis://HOST" (a server that processes and machines share), or a
            `fluxibly.stores.Store`.
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
    store: Store = attrs.field(default=None, converter=_to_store)
    on_store_error: OnStoreError = attrs.field(default="local", validator=validator(one_of, ON_STORE_ERROR))
    _shared: Shared = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_shared", Shared(self.store, self.on_store_error, "CircuitBreaker"))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call, shared = request.call, self._shared
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        circuit = _Circuit(request, info, f"circuit {name_of(info, request, self.by)}")
        while True:
            if shared.local:
                found: Entry | None = shared.store.load(circuit.key, call.clock())
            else:
                found = yield from shared.ask(call, "load", circuit.key)
            circuit.state = _NEVER_OPENED if found is None else found.value
            if found is None or not found.value.startswith(_OPEN):
                break
            response = yield from self._probe(circuit, call_next, found.left - _REMEMBERED)
            if response is not None:
                return response
        try:
            return (yield from call_next(request))
        except Exception as error:
            if circuit.is_failure(error):
                yield from self._count(circuit, error)
            raise

    def _count(self, circuit: _Circuit, error: Exception) -> Flow[None]:
        """Count a failure while the circuit is closed, and open it if there are too many."""
        # Each state has a sum of its own, so that a circuit that closes begins anew.
        key = f"{circuit.key} {circuit.state.decode()}"
        count = yield from self._shared.tell(circuit.call, "add", key, 1.0, self.within)
        if (count or 0.0) >= self.failures:
            yield from self._open(circuit, error, f"{self.failures} failures within {self.within:g} s")

    def _probe(self, circuit: _Circuit, call_next: CallNext, left: float) -> Flow[Response | None]:
        """Try a provider again if it is time, and return its answer. Return None if the circuit has changed meanwhile."""
        call, shared, request = circuit.call, self._shared, circuit.request
        if left > 0:
            raise self._refusal(circuit, f"is open for {left:.3g} s more", left)
        key, who = f"{circuit.key} probes", new_name()
        ending = None if shared.local else Later(call, shared, lambda: [("release", key, who)])
        try:
            busy = yield from shared.ask(call, "lease", key, who, self.probes, wait=False)
            if busy is not None:
                raise self._refusal(circuit, f"has {self.probes} probes under way", None)
            response: Response | None = None
            if (yield from self._is_as_it_was(circuit)):
                log_decision(request, "CircuitBreaker", f"tries {whom(request)} again, with this call")
                circuit.begin()
                response = yield from call_next(request)
                yield from self._close(circuit)
        except Exception as error:
            if circuit.is_failure(error):
                yield from self._open(circuit, error, f"a probe failed with {error_type(error)}")
            elif circuit.is_answer(error):
                yield from self._close(circuit)
            if ending is not None:
                yield from ending.run()
            raise
        finally:
            if ending is None:
                shared.store.release(key, who, call.clock())
        if ending is not None:
            yield from ending.run()
        return response

    def _open(self, circuit: _Circuit, error: Exception, why: str) -> Flow[None]:
        if (yield from self._change(circuit, _OPEN, self.open_for + _REMEMBERED)):
            what = f"opens the circuit of {whom(circuit.request)} for {self.open_for:g} s: {why}"
            log_decision(circuit.request, "CircuitBreaker", what, error)

    def _close(self, circuit: _Circuit) -> Flow[None]:
        if (yield from self._change(circuit, _CLOSED, _REMEMBERED)):
            what = f"closes the circuit of {whom(circuit.request)}"
            log_decision(circuit.request, "CircuitBreaker", what)

    def _change(self, circuit: _Circuit, state: bytes, seconds: float) -> Flow[bool]:
        """Change the state of a circuit, unless it has changed since the call began. Return whether this has changed it.

        So calls that were under way when it opened neither close it nor keep it open, nor open it again after a probe.
        """
        if not (yield from self._is_as_it_was(circuit)):
            return False
        yield from self._shared.tell(circuit.call, "save", circuit.key, state + new_name().encode(), seconds)
        return True

    def _is_as_it_was(self, circuit: _Circuit) -> Flow[bool]:
        found: Entry | None = yield from self._shared.tell(circuit.call, "load", circuit.key)
        return circuit.state == (_NEVER_OPENED if found is None else found.value)

    def _refusal(self, circuit: _Circuit, why: str, left: float | None) -> CircuitOpen:
        request, info = circuit.request, circuit.info
        log_decision(request, "CircuitBreaker", f"refuses the call: the circuit of {whom(request)} {why}")
        return CircuitOpen(
            f"CircuitBreaker refuses a call of {whom(request)}: the circuit {why}; ask another provider, or later",
            retry_after=left,
            provider=info.framework,
            model=request.model,
        )
