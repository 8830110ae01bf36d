"""Middleware that bounds the calls at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs

from fluxibly._checks import number, one_of, validator, whole
from fluxibly._logs import log_decision
from fluxibly.errors import QueueFull
from fluxibly.flow import CallNext, Flow, provider_of
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._keys import By, check_by, name_of, to_by, whom
from fluxibly.middleware._shared import (
    ON_STORE_ERROR,
    Later,
    OnStoreError,
    Shared,
    new_name,
    wait_for_turn,
)
from fluxibly.stores import Store, Turn, to_store
from fluxibly.types import ProviderInfo, Request, Response


def _to_store(value: Any) -> Any:
    return to_store(value, ("lease", "release"))


@attrs.frozen(eq=False)
class Concurrency(Rebuilt):
    """Middleware that lets at most `limit` calls run at once. The others wait, first come, first served.

    A call has its place until its answer is whole, or until its stream has ended, however it ends. A call that is cancelled
    or given up while it waits leaves the queue.

    Args:
        limit: the most calls at once, from 1 up.
        queue: the most calls that wait; one more is refused. 0 refuses whatever cannot run at once.
        max_wait: the most seconds to wait.
        by: what has a limit of its own: "provider", "provider and model" (the default), or what a function of the request
            returns.
        store: where the places are: "memory" (the default: each instance has its own), "sqlite:PATH" (a file that the
            processes of a machine share), "redis://HOST" (a server that processes and machines share), or a
            `fluxibly.stores.Store`.
        on_store_error: what happens when the store fails: "local" keeps the limit in this process until it works again,
            "raise" raises `StoreError`, "open" lets calls pass.

    Raises:
        QueueFull: too many calls wait, or this one has waited for `max_wait` seconds.
    """

    limit: int = attrs.field(validator=validator(whole, 1))
    queue: int = attrs.field(default=1000, validator=validator(whole, 0), kw_only=True)
    max_wait: float = attrs.field(default=60.0, validator=validator(number, 0), kw_only=True)
    by: By = attrs.field(default="provider and model", converter=to_by, validator=validator(check_by), kw_only=True)
    store: Store = attrs.field(default=None, converter=_to_store, kw_only=True)
    on_store_error: OnStoreError = attrs.field(
        default="local", validator=validator(one_of, ON_STORE_ERROR), kw_only=True
    )
    _shared: Shared = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_shared", Shared(self.store, self.on_store_error, "Concurrency"))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call, shared = request.call, self._shared
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        name = name_of(info, request, self.by)
        key, who = f"concurrency {name}", new_name()
        if shared.local:
            try:
                turn = shared.store.lease(key, who, self.limit, call.clock())
                if turn is not None:
                    yield from self._wait(request, info, key, who, turn)
                return (yield from call_next(request))
            finally:
                shared.store.release(key, who, call.clock())
        ending = Later(call, shared, lambda: [("release", key, who)])
        try:
            turn = yield from shared.ask(call, "lease", key, who, self.limit)
            if turn is not None:
                yield from self._wait(request, info, key, who, turn)
            response = yield from call_next(request)
        except Exception:
            yield from ending.run()
            raise
        yield from ending.run()
        return response

    def _wait(self, request: Request, info: ProviderInfo, key: str, who: str, turn: Turn) -> Flow[None]:
        if turn.ahead >= self.queue:
            raise self._full(request, info, f"{turn.ahead} calls wait already (queue={self.queue})")
        waited = yield from wait_for_turn(
            request,
            partial(self._shared.ask, request.call, "lease", key, who, self.limit),
            turn,
            self.max_wait,
            lambda turn, waited: self._full(
                request, info, f"waited {waited:.3g} s (max_wait={self.max_wait:g}), with {turn.ahead} calls ahead"
            ),
        )
        log_decision(request, "Concurrency", f"let the call wait {waited:.3g} s for one of {self.limit} places")

    def _full(self, request: Request, info: ProviderInfo, why: str) -> QueueFull:
        what = f"Concurrency refuses a call of {whom(request)}: {why}; raise limit={self.limit}, or send less"
        log_decision(request, "Concurrency", f"refuses the call: {why}")
        return QueueFull(what, provider=info.framework, model=request.model)
