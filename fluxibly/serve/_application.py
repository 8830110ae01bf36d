"""The ASGI application: its routes, and the model behind them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fluxibly.llm import AsyncLLM
from fluxibly.serve._answers import KEEP_ALIVE, Streamed, Whole, json_response, note_call
from fluxibly.serve._gate import Gate
from fluxibly.serve._requests import Refused, Settings, body_of, read, wrong

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from starlette.requests import Request as HTTPRequest
    from starlette.types import ASGIApp


def application(
    llm: AsyncLLM,
    *,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    models: Sequence[str] = (),
    pass_extra: bool = False,
    keep_alive: float = KEEP_ALIVE,
) -> ASGIApp:
    """Return an ASGI application that answers OpenAI's chat completions API by a model and its stack.

    It has `POST /v1/chat/completions` and `GET /v1/models`. It closes the model when its server ends.

    Args:
        llm: the model.
        token: the bearer token that clients have to send as their API key. None: they need none.
        hosts: the names that the `Host` header of a request may have. None: any.
        models: the models that a request may name. Empty: the model of a request is ignored, and the model is that of `llm`.
        pass_extra: whether parameters that fluxibly does not know go to the service (`Request.extra`). They are ignored
            otherwise, or refused where the answer would mislead.
        keep_alive: seconds of silence after which a stream sends a comment, so that no proxy ends the connection.
    """
    from starlette.routing import Route, Router

    routes = _Routes(llm, Settings(tuple(models), pass_extra), keep_alive)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        async with llm:
            yield

    # Not an application of Starlette's, whose own answers to errors would come before those of the gate.
    router = Router(
        [
            Route("/v1/chat/completions", routes.complete, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{model:path}", routes.model, methods=["GET"]),
        ],
        redirect_slashes=False,
        lifespan=lifespan,
    )
    return Gate(router, token, hosts)


class _Routes:
    """The functions that answer requests."""

    def __init__(self, llm: AsyncLLM, settings: Settings, keep_alive: float) -> None:
        self._llm = llm
        self._pipeline = llm.pipeline.with_middleware([note_call, *llm.pipeline.middleware])
        self._settings = settings
        self._keep_alive = keep_alive

    async def complete(self, http: HTTPRequest) -> Any:
        """Answer a chat completion."""
        asked = read(await body_of(http), self._settings)
        try:
            request = self._llm.request(asked.messages, asked.overrides)
        except (TypeError, ValueError) as error:
            raise wrong(error) from None
        context = _context_of(http)
        if asked.stream:
            return Streamed(self._pipeline, request, context, usage=asked.usage, keep_alive=self._keep_alive)
        return Whole(self._pipeline, request, context)

    async def models(self, _: HTTPRequest) -> Any:
        """Answer the list of models."""
        return json_response({"object": "list", "data": [_described(model) for model in self._known()]})

    async def model(self, http: HTTPRequest) -> Any:
        """Answer the description of a model."""
        model = http.path_params["model"]
        if model not in self._known():
            raise Refused(404, "this server has no such model", code="model_not_found", param="model")
        return json_response(_described(model))

    def _known(self) -> Sequence[str]:
        return self._settings.models or (self._llm.config.model,)


def _described(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "fluxibly"}


def _context_of(http: HTTPRequest) -> Context | None:
    """Return the context of the client's span, if it sends one. No other header of a request has an effect on the call."""
    headers = {name: value for name in ("traceparent", "tracestate") if (value := http.headers.get(name))}
    if "traceparent" not in headers:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers)
