"""The composition of middleware into one flow, and the innermost flow."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from inspect import CO_GENERATOR
from types import CodeType, CoroutineType, FunctionType, GeneratorType
from typing import Any, TypeGuard

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator
from fluxibly.errors import interrupted
from fluxibly.flow.effects import END, AttemptEnd, CallNext, Flow, Middleware, Send, Source
from fluxibly.types import Chunk, Request, Response, with_headers


def compose(middleware: Sequence[Middleware]) -> CallNext:
    """Return the stack as one `CallNext`, with the first middleware outermost and `send` innermost."""
    call_next: CallNext = send
    for layer in reversed(middleware):
        call_next = bind(layer, call_next)
    return call_next


def bind(layer: Middleware, call_next: CallNext) -> CallNext:
    """Return the `CallNext` that runs `layer` around `call_next`. Its attribute `parts` holds these two."""
    call = layer if isinstance(layer, FunctionType) else layer.__call__  # saves a lookup in each call
    if is_generator_function(layer):

        def bound(request: Request) -> Flow[Response]:
            return call(request, call_next)

    else:

        def bound(request: Request) -> Flow[Response]:
            return _checked(call(request, call_next), layer)

    with_parts: Any = bound
    with_parts.parts = (layer, call_next)
    return bound


def is_generator_function(layer: object) -> bool:
    """Whether a call of `layer` always returns a generator."""
    code = code_of(layer)
    return code is not None and bool(code.co_flags & CO_GENERATOR)


def code_of(layer: object) -> CodeType | None:
    """Return the code that runs when a middleware is called, or None if it is not plain Python."""
    call: object = layer if isinstance(layer, FunctionType) else getattr(type(layer), "__call__", None)  # noqa: B004  # the method itself
    code = getattr(call, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _checked(flow: Any, layer: Middleware) -> Flow[Response]:
    if _is_flow(flow):
        return flow
    kind = kind_of(flow)
    if isinstance(flow, CoroutineType):
        flow.close()  # otherwise Python warns that the coroutine was never awaited
    raise TypeError(
        f"the middleware {layer_name(layer)} returned {kind}, expected a generator; write it as "
        "a generator function: def mw(request, call_next): return (yield from call_next(request))"
    )


def _is_flow(value: object) -> TypeGuard[Flow[Response]]:
    return type(value) is GeneratorType or isinstance(value, Generator)  # the check against the abstract class is slow


def layer_name(layer: object) -> str:
    """Return the name of a middleware for a message."""
    name = getattr(layer, "__qualname__", None)
    return name if isinstance(name, str) else type(layer).__qualname__


def send(request: Request) -> Flow[Response]:
    """Run one attempt at the provider: the innermost flow.

    After output has gone out, an error is raised as `StreamInterrupted` with the error as its cause.
    """
    call = request.call
    call.attempts += 1
    call.interruption = call.said = None
    call.sent_model = request.model
    call.sent_messages = request.messages
    answer: Aggregator | None = None
    start = 0.0 if call.attempt_times is None else call.clock()
    try:
        reply = yield Send(request if call.trace_headers is None else with_headers(request, call.trace_headers))
        if type(reply) is Source:
            answer = Aggregator()
            keep = answer.texts.append
            while (item := reply.chunk) is not END:
                chunk = item if type(item) is Chunk else _to_chunk(item, call.provider.name)
                if chunk.text_only:
                    keep(chunk.text)
                else:
                    answer.add(chunk)
                yield chunk
            response = answer.response()
            call.said = response.text
        else:
            response = reply if type(reply) is Response else _to_response(reply, call.provider.name)
    except BaseException as error:
        partial = None if answer is None else answer.response()
        call.model = None if partial is None else partial.model or request.model
        call.usage = None if partial is None else partial.usage
        call.finish_reason = None if partial is None else partial.finish_reason
        if not isinstance(error, Exception):
            raise
        if call.watched:
            end = AttemptEnd(request, error=error)
            yield end
            end.error = None  # the frames that the error refers to may refer to this effect
        if partial is None or not partial.has_output:
            raise
        call.interruption = interrupted(request, partial, error)
        raise call.interruption from error
    finally:
        if call.attempt_times is not None:
            call.attempt_times.append(call.clock() - start)
    call.model = response.model or request.model
    call.usage = response.usage
    call.finish_reason = response.finish_reason
    if call.watched:
        yield AttemptEnd(request, response)
    return response


def _to_chunk(item: object, provider: str) -> Chunk:
    if isinstance(item, str):
        return Chunk(item)
    if isinstance(item, Chunk):
        return item
    raise TypeError(f"the provider {provider} yielded {kind_of(item)}, expected a Chunk or a str from its stream()")


def _to_response(reply: object, provider: str) -> Response:
    if isinstance(reply, str):
        return Response(reply)
    if isinstance(reply, Response):
        return reply
    raise TypeError(
        f"the provider {provider} returned {kind_of(reply)}, expected a Response or a str from its complete()"
    )
