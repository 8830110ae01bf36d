"""Middleware that keeps answers, and gives them to the same requests later."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any, TypeAlias

import attrs

from fluxibly._checks import kind_of, number, problem, truth, validator, whole
from fluxibly._logs import report_once
from fluxibly.errors import ConfigError, DeadlineExceeded, error_type
from fluxibly.flow import CallNext, Flow, as_chunks, provider_of, sleep
from fluxibly.flow.effects import More
from fluxibly.functions import check_function, to_function
from fluxibly.middleware._answer_bytes import from_bytes, to_bytes
from fluxibly.middleware._answers import Answer, MemoryAnswers, Recorder, TextChanged
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._flights import Flight, Flights
from fluxibly.middleware._leads import Lead, can_lead
from fluxibly.middleware._request_key import VERSION, request_key
from fluxibly.middleware._shared import Shared
from fluxibly.middleware.validation import Validation
from fluxibly.stores import Entry, Store, to_store
from fluxibly.types import CallRecord, ProviderInfo, Request, Response

_optional = attrs.validators.optional
_IN_MEMORY = 256_000_000
"""The bytes that answers may take in memory unless the user says otherwise."""
_NEEDS = ("load", "save")

Text: TypeAlias = Callable[[Request], str]
"""A function of the user's that names something about a request."""


def _to_store(value: str | Store | None) -> str | Store:
    return "memory" if value is None else value


def _repr_of_store(value: str | Store) -> str:
    """Return the `repr` of a store, without the password in a URL."""
    if isinstance(value, str) and "://" in value:
        from fluxibly.stores.redis import masked_url  # late, because few programs need a server

        return repr(masked_url(value))
    return repr(value)


def _to_key(value: Text | str | None) -> Text | None:
    return to_function(value)


def _check_namespace(name: str, value: object) -> str | None:
    if isinstance(value, str):
        return None if value else problem(name, "a non-empty str or a function of the request", value)
    if not callable(value):
        return problem(name, "a str or a function of the request", value)
    return check_function(name, value)


@attrs.frozen(eq=False)
class Cache(Rebuilt):
    """Middleware that answers a request from memory, a file or a server, if it has answered the same before.

    The key of a request is made of the provider and its configuration, the model, the messages, the tools and all
    parameters. Its API key is no part of it: where keys mean different tenants, give a `namespace`.

    Whole calls and streams share their answers. A stream gets the chunks that came at first. Only whole answers are kept:
    nothing that failed, was interrupted or given up, was cut by a filter (`finish_reason` "content_filter" or "error"), or
    says nothing. Calls that are the same and run at once send one request, and an error is never shared. A whole call waits
    for another as long as that takes; for the rest see `streams_wait`. So do the calls of several processes, where their
    store has leases (`lease` and `release` of `fluxibly.stores.Store`): those that wait look for the answer after 50 ms, later
    every half second, and one of them asks if the call before has failed, or if its process has died and its lease has ended.

    In a call, `metadata={"cache": "skip"}` leaves the cache alone, and `metadata={"cache": "refresh"}` asks again and keeps
    the new answer. `response.cache_hit` says whether an answer came from the cache.

    A store that fails is reported once on stderr, and the calls go on without it. Put the cache inside of `Redact`, and
    outside of `Guard`, `Validation`, `Fallback` and `Retry`.

    Args:
        store: where the answers are: "memory" (each instance has its own), "sqlite:PATH" (a file that processes share),
            "redis://HOST" (a server that machines share), or an object with `load` and `save` of `fluxibly.stores.Store`, and
            with `lease` and `release` if calls of several processes are to wait for each other.
        ttl: the seconds for which an answer is kept; None: for good.
        max_bytes: the most bytes that answers take, from 1 up: 256 MB in memory and 4 GB in a file, unless given. Those that
            were not used for longest are forgotten first. A larger answer is not kept. A Redis server has a setting of its
            own, `maxmemory`.
        namespace: keeps the answers of different users, tenants or programs apart: a str, or a function of the request that
            returns one. Every store but "memory" needs it; "shared" says that everybody may have the answers.
        key: a function of the request that returns the text by which requests are the same, in place of the request itself.
        pace: whether a stream from the cache takes the time between chunks that it took at first. Whole calls never wait.
        streams_wait: the seconds for which a stream waits for another call, and a whole call for a stream. 0: not at all. A
            stream whose consumer stops reading would hold up the others.

    Raises:
        ConfigError: the store is unknown, needs a namespace, or has a `max_bytes` of its own.
        ValueError: `metadata["cache"]` is neither "skip" nor "refresh".
        TypeError: `key` or `namespace` returns something else than a str.
    """

    store: str | Store = attrs.field(default="memory", converter=_to_store, repr=_repr_of_store)
    ttl: float | None = attrs.field(default=None, validator=_optional(validator(number, above=0)), kw_only=True)
    max_bytes: int | None = attrs.field(default=None, validator=_optional(validator(whole, 1)), kw_only=True)
    namespace: str | Text | None = attrs.field(
        default=None, validator=_optional(validator(_check_namespace)), kw_only=True
    )
    key: Text | None = attrs.field(
        default=None, converter=_to_key, validator=_optional(validator(check_function)), kw_only=True
    )
    pace: bool = attrs.field(default=False, validator=validator(truth), kw_only=True)
    streams_wait: float = attrs.field(default=0.0, validator=validator(number, 0), kw_only=True)
    _answers: _InMemory | _InStore = attrs.field(init=False, repr=False)
    _flights: Flights[Answer] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_answers", self._find_answers())
        object.__setattr__(self, "_flights", Flights[Answer](self.streams_wait))

    def _find_answers(self) -> _InMemory | _InStore:
        if self.store == "memory":
            return _InMemory(self.ttl, _IN_MEMORY if self.max_bytes is None else self.max_bytes)
        store = to_store(self.store, _NEEDS, max_bytes=self.max_bytes)
        if store is self.store and self.max_bytes is not None:
            raise ConfigError(
                f"Cache: max_bytes: expected none with a store of your own, got {self.max_bytes}; set it there, such as "
                "SQLiteStore(path, max_bytes=…)"
            )
        if self.namespace is None:
            raise ConfigError(
                "Cache: expected a namespace, because others may share the store, and the key of a request has no API key; "
                'write namespace="my-app", or a function for tenants: namespace=lambda request: request.metadata["tenant"], '
                'or namespace="shared" if everybody may have the answers'
            )
        return _InStore(store, self.ttl, self.streams_wait)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        call.cache_hit = False
        wish = request.metadata.get("cache")
        if wish is not None:
            if wish == "skip":
                return (yield from call_next(request))
            if wish != "refresh":
                raise ValueError("Cache: " + problem("metadata['cache']", "'skip' or 'refresh'", wish))
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        key = self._key_of(request, info)
        if key is None:
            return (yield from call_next(request))
        answer = self._answers.at_once(key, call) if wish is None else None
        if answer is None:
            return (yield from self._share(request, call_next, key, refresh=wish is not None))
        if call.streaming:
            yield from self._replay(call, answer)
        call.cache_hit = True
        call.interruption = call.said = None  # they are of an attempt before this answer
        return answer.response

    def _key_of(self, request: Request, info: ProviderInfo) -> str | None:
        """Return the key of a request; None if it has none.

        Raises:
            TypeError: a function of the user's has not returned a str.
        """
        namespace = self.namespace
        if namespace is None:
            space = ""
        elif isinstance(namespace, str):
            space = namespace
        else:
            space = _text("namespace", namespace(request))
        if self.key is not None:
            text = _text("key", self.key(request))
            return sha256(f"{VERSION} {len(space)} {space} {text}".encode(errors="surrogatepass")).hexdigest()[:40]
        try:
            return request_key(request, info, space)
        except TypeError as error:
            report_once("cache key", f"Cache: {error}; such requests are not cached")
            return None

    def _share(self, request: Request, call_next: CallNext, key: str, *, refresh: bool) -> Flow[Response]:
        """Take the answer of another call that runs at the same time, or of the store; else ask, for others too."""
        call = request.call
        flight = yield from self._flights.join(call, key, waits=not refresh)
        answer = None if flight is None else flight.answer
        if answer is None:
            lead: Lead | None = None
            try:
                if not refresh:
                    answer = yield from self._answers.load(key, call)
                    if answer is None and flight is not None:
                        lead = self._answers.lead(key, call)
                        if lead is not None:
                            answer = yield from lead.begin(partial(self._answers.load, key, call))
                if answer is None:
                    response = yield from self._ask(request, call_next, key, flight)
                    if lead is not None:
                        yield from lead.end()
                    return response
                if flight is not None:
                    flight.land(answer)
            except Exception:
                if lead is not None:
                    yield from lead.end()
                raise
            finally:
                if flight is not None:
                    self._flights.leave(call, key, flight)
        if call.streaming:
            yield from self._replay(call, answer)
        call.cache_hit = True
        call.interruption = call.said = None
        return answer.response

    def _ask(self, request: Request, call_next: CallNext, key: str, flight: Flight[Answer] | None) -> Flow[Response]:
        """Ask the provider, and keep its answer."""
        call = request.call
        recorder: Recorder | None = None
        if call.streaming:
            most = math.inf if self.max_bytes is None else self.max_bytes
            # Others may replay what is in a store at its own pace.
            recorder = Recorder(call, most, timed=self.pace or self.store != "memory")
            response = yield from recorder.over(call_next(request))
        else:
            response = yield from call_next(request)
        answer = _answer_of(response, call, recorder)
        if answer is not None:
            if flight is not None:
                flight.land(answer)
            if response.finish_reason != "content_filter" and response.has_output:
                yield from self._answers.save(key, answer, call)
        return response

    def _replay(self, call: CallRecord, answer: Answer) -> Flow[None]:
        """Let out the chunks of an answer."""
        pieces = answer.pieces
        if pieces is None:
            for chunk in as_chunks(answer.response):
                yield More(chunk)
        elif not (self.pace and pieces.times):
            for chunk in pieces:
                yield More(chunk)
        else:
            behind = call.clock() - pieces.times[0]
            for chunk, at in zip(pieces, pieces.times, strict=True):
                # What the consumer takes for a chunk is part of the wait for the next.
                if (left := at + behind - call.clock()) > 0:
                    yield from sleep(left)
                yield More(chunk)


def _answer_of(response: object, call: CallRecord, recorder: Recorder | None) -> Answer | None:
    """Return the answer that a call has got, if it is whole."""
    if not isinstance(response, Response) or response.finish_reason == "error" or call.interruption is not None:
        return None
    try:
        pieces = None if recorder is None else recorder.pieces(response)
        return Answer.of(response, call, pieces)
    except TextChanged:
        return None  # the driver will refuse it
    except Exception as error:  # noqa: BLE001  # what a user's class does when it is copied
        _report_unkept(error)
        return None


def _report_unkept(error: Exception) -> None:
    report_once("cache answer", f"Cache: an answer cannot be kept ({error_type(error)}), because not all in it is data")


def _text(name: str, value: object) -> str:
    if isinstance(value, str) and value:
        return value
    got = "an empty str" if value == "" else kind_of(value)
    raise TypeError(f"Cache: {name}: expected a non-empty str from its function, got {got}")


class _InMemory:
    """The answers of a cache in memory."""

    def __init__(self, ttl: float | None, max_bytes: int) -> None:
        self._ttl = ttl
        self._kept = MemoryAnswers(max_bytes)

    def at_once(self, key: str, call: CallRecord) -> Answer | None:
        """Return an answer that can be had without I/O."""
        return self._kept.load(key, call.clock())

    def lead(self, key: str, call: CallRecord) -> Lead | None:
        """Return None: only this process has these answers."""

    def load(self, key: str, call: CallRecord) -> Flow[Answer | None]:
        """Return an answer. Between `at_once` and the beginning of a flight, another may have landed."""
        yield from ()
        return self._kept.load(key, call.clock())

    def save(self, key: str, answer: Answer, call: CallRecord) -> Flow[None]:
        """Keep an answer."""
        yield from ()
        self._kept.save(key, answer, self._ttl, call.clock())


class _InStore:
    """The answers of a cache in a store."""

    def __init__(self, store: Any, ttl: float | None, patience: float) -> None:
        self._ttl = ttl
        self._patience = patience
        """The seconds for which a stream waits for another call."""
        self._can_lead = can_lead(store)
        # Two, because a disk that is full can be read.
        self._reading, self._writing = (Shared(store, "open", "Cache") for _ in range(2))

    def at_once(self, key: str, call: CallRecord) -> Answer | None:
        """Return None: calls at once read the store once."""
        return None

    def lead(self, key: str, call: CallRecord) -> Lead | None:
        """Return the means to ask for the calls of other processes too, or None if none of them waits."""
        if not self._can_lead or self._reading.is_down or (call.streaming and not self._patience):
            return None
        return Lead(call, self._reading, self._writing, key, self._patience)

    def load(self, key: str, call: CallRecord) -> Flow[Answer | None]:
        """Return an answer."""
        shared = self._reading
        if shared.local:
            entry: Entry | None = shared.do(call, "load", _name(key))
        else:
            entry = yield from shared.ask(call, "load", _name(key))
        if entry is None:
            return None
        try:
            streamed = call.streaming or self._patience > 0
            return from_bytes(entry.value, streamed=streamed, parse=partial(_parse_again, call))
        except Exception as error:  # noqa: BLE001  # the bytes may be anybody's
            report_once(
                "cache entry", f"Cache: an answer in the store cannot be read ({error_type(error)}), so it is replaced"
            )
            return None

    def save(self, key: str, answer: Answer, call: CallRecord) -> Flow[None]:
        """Keep an answer."""
        try:
            value = to_bytes(answer)
        except Exception as error:  # noqa: BLE001  # what an answer may contain is anybody's
            _report_unkept(error)
            return
        try:
            if self._writing.local:
                self._writing.do(call, "save", _name(key), value, self._ttl)
            else:
                yield from self._writing.tell(call, "save", _name(key), value, self._ttl)
        except DeadlineExceeded:
            pass  # the answer is there


def _name(key: str) -> str:
    """Return the name of an answer in a store, which has other things too."""
    return f"answer {key}"


def _parse_again(call: CallRecord, text: str) -> Any:
    """Parse an answer as the `Validation` of the stack does, because a store keeps no objects of classes."""
    for layer in call.layers:
        if isinstance(layer, Validation) and layer.shape is not None:
            return layer.shape.parse(text)
    raise ValueError("no Validation of the stack has a schema")
