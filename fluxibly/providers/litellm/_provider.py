"""The framework `litellm`: any model that LiteLLM supports, under LiteLLM's name.

Requests are in OpenAI's format, which LiteLLM translates. LiteLLM's global settings are not changed, its own retries
are switched off for each call, and its exceptions become fluxibly's. On trio its synchronous functions run in threads.

When a call fails, LiteLLM prints advice to stdout. The only switch for that is global, so it is left to the program:
`litellm.suppress_debug_info = True`. If a service does not count tokens, the usage is LiteLLM's estimate.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import httpx

from fluxibly._checks import secrets_in
from fluxibly._extras import pip_install
from fluxibly._merging import merge_into
from fluxibly.config import LLMConfig
from fluxibly.errors import BadRequest, ConfigError
from fluxibly.limits import Timeouts
from fluxibly.provider import Threaded
from fluxibly.providers._libraries.calls import (
    LibraryLimits,
    LibraryStream,
    OpenStream,
    acall_within,
    call_within,
    checked_key,
    info_of,
    library_stream,
    read_timeout,
)
from fluxibly.providers._libraries.errors import ErrorTranslator
from fluxibly.providers._libraries.loops import PerLoop, on_asyncio
from fluxibly.providers._libraries.services import Services
from fluxibly.providers.litellm._answers import (
    StreamReader,
    aclose_stream,
    body_of,
    close_stream,
    cut_stream,
    response_of,
)
from fluxibly.providers.litellm._clients import aclose_all, aclose_idle, close_idle
from fluxibly.providers.litellm._services import check_fallbacks, service_of, telemetry_name
from fluxibly.types import Chunk, ProviderInfo, Request, Response

_COST_MAP = "LITELLM_LOCAL_MODEL_COST_MAP"
_KEY_VARIABLES = ("_API_KEY", "_ACCESS_KEY", "_TOKEN", "_SECRET")
_importing = threading.Lock()


@contextmanager
def _local_cost_map() -> Generator[None]:
    """Make LiteLLM use the price map that it ships. Otherwise it fetches a map from the network and waits for it."""
    with _importing:
        if _COST_MAP in os.environ:
            yield
            return
        os.environ[_COST_MAP] = "True"
        try:
            yield
        finally:
            os.environ.pop(_COST_MAP, None)


def _load() -> Any:
    try:
        with _local_cost_map():
            import litellm
    except ImportError as missing:
        raise ConfigError(
            f"the framework 'litellm' needs packages that are not installed: {pip_install('litellm')} ({missing})"
        ) from missing
    return litellm


_per_loop: PerLoop[Any] = PerLoop(_load, aclose_all)
"""LiteLLM for each event loop. Its clients do not outlive the loop in which they were used."""


class LiteLLMProvider:
    """A model under LiteLLM's name ("gpt-4o", "anthropic/claude-…", "bedrock/…", …).

    Args:
        config: `api_key`, `api_base`, `headers` and `timeout` are passed on.

    Raises:
        ConfigError: LiteLLM does not know which service has the model, or its own fallbacks are configured.
        AuthenticationError: the API key is malformed.
    """

    obeys = True

    def __init__(self, config: LLMConfig) -> None:
        check_fallbacks(config.additional_params, "additional_params.", ConfigError)
        self._litellm = _load()
        self._service = service_of(self._litellm, config.model, config.additional_params, config.api_base)
        self.info = _info(self._service, config)
        self._services = Services(self.info)
        self.limits = LibraryLimits.of(config)
        self._settings: dict[str, Any] = {"timeout": _timeout(config.timeouts), "max_retries": 0, "num_retries": 0}
        self._key = checked_key(config)
        access = {"api_key": self._key, "api_base": config.api_base}
        self._access = {name: value for name, value in access.items() if value is not None}
        self._headers = dict(config.headers)

    def complete(self, request: Request) -> Response:
        """Return the model's whole answer; `raw` is LiteLLM's answer as plain data.

        Raises:
            ProviderError: the service or the connection failed, or the model does not support the request.
        """
        keywords, service = self.prepare(request, stream=False)
        try:
            limits = self.limits.of_call(request.call)
            answer = call_within(lambda: self._litellm.completion(**keywords), limits)
            return response_of(answer, service)
        except Exception as error:  # noqa: BLE001  # raised below, without LiteLLM's exception as its context
            failure = self.explain(error, request)
        raise failure

    def stream(self, request: Request) -> LibraryStream:
        """Return the model's answer as a stream; errors as for `complete`."""
        keywords, service = self.prepare(request, stream=True)
        reader = StreamReader(service)

        def open_stream() -> OpenStream:
            stream = reader.opened(self._litellm.completion(**keywords))
            return OpenStream(stream, partial(close_stream, stream), partial(cut_stream, stream))

        limits = self.limits.of_call(request.call)
        return LibraryStream(open_stream, limits, reader.read, reader.last, self.explaining(request))

    def close(self) -> None:
        """Close the idle connections of LiteLLM's clients, which the whole process shares."""
        close_idle(self._litellm)

    def prepare(self, request: Request, *, stream: bool) -> tuple[dict[str, Any], str]:
        """Return the keywords of a call, and LiteLLM's name for the service, which is recorded on the call.

        Entries of `extra` are keywords, which go into the body.

        Raises:
            BadRequest: LiteLLM does not support a parameter, or would fall back to other models by itself.
        """
        check_fallbacks(request.extra, "extra.", BadRequest)
        check_fallbacks({"model_fallbacks": self._litellm.model_fallbacks}, "litellm.", BadRequest)
        base = self._access.get("api_base")
        service = service_of(self._litellm, request.extra.get("model", request.model), request.extra, base)
        keywords = {**self._settings, **body_of(request, service, stream=stream)}
        if request.call.timeouts is not None:
            keywords["timeout"] = _timeout(request.call.timeouts)
        merge_into(keywords, request.extra)
        headers = dict(request.headers)
        if service == self._service:  # the key and the headers must not be sent to another service
            keywords = {**self._access, **keywords}
            headers = self._headers | headers
        if headers:
            keywords["extra_headers"] = headers
        if service:
            base = keywords.get("api_base")
            self._services.note(request.call, self._services.at(telemetry_name(service), base))
        return keywords, service

    def explain(self, error: Exception, request: Request, *, streamed: bool = False) -> Exception:
        """Return fluxibly's error for an exception of LiteLLM."""
        held = [value for name, value in os.environ.items() if name.endswith(_KEY_VARIABLES) and len(value) > 8]
        given = (*self._headers.values(), *request.headers.values(), *secrets_in(request.extra))
        secrets = tuple(secret for secret in (self._key, *given, *held) if secret)
        explain = ErrorTranslator(library="LiteLLM", framework="litellm", secrets=secrets)
        return explain(error, request.model, streamed=streamed)

    def explaining(self, request: Request) -> Callable[[Exception, bool], Exception]:
        """Return `explain` as a callback for the errors of a stream."""
        return lambda error, streamed: self.explain(error, request, streamed=streamed)


class AsyncLiteLLMProvider:
    """`LiteLLMProvider` for async pipelines."""

    obeys = True

    def __init__(self, config: LLMConfig) -> None:
        self._sync = LiteLLMProvider(config)
        self._threaded = Threaded(self._sync)
        self.info = self._sync.info

    async def complete(self, request: Request) -> Response:
        """Return the model's whole answer; see `LiteLLMProvider.complete`."""
        if not on_asyncio():
            return cast("Response", await self._threaded.complete(request))
        keywords, service = self._sync.prepare(request, stream=False)
        try:
            limits = self._sync.limits.of_call(request.call)
            answer = await acall_within(lambda: _per_loop.get().acompletion(**keywords), limits)
            return response_of(answer, service)
        except Exception as error:  # noqa: BLE001  # raised below, without LiteLLM's exception as its context
            failure = self._sync.explain(error, request)
        raise failure

    def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """Return the model's answer as a stream; see `LiteLLMProvider.stream`."""
        return self._steps(request) if on_asyncio() else cast("AsyncGenerator[Chunk]", self._threaded.stream(request))

    def _steps(self, request: Request) -> AsyncGenerator[Chunk]:
        keywords, service = self._sync.prepare(request, stream=True)
        reader = StreamReader(service)

        async def open_stream() -> AsyncIterator[Any]:
            return _AsyncStream(reader.opened(await _per_loop.get().acompletion(**keywords)))

        limits = self._sync.limits.of_call(request.call)
        return library_stream(open_stream, limits, reader.read, reader.last, self._sync.explaining(request))

    async def aclose(self) -> None:
        """Close the idle connections of LiteLLM's clients in the running event loop. All others close with the loop."""
        self._sync.close()
        if on_asyncio():
            await aclose_idle(_per_loop.get())


class _AsyncStream:
    """LiteLLM's asynchronous stream with the method `aclose()`, which it lacks."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._stream)

    async def aclose(self) -> None:
        await aclose_stream(self._stream)


def _timeout(times: Timeouts) -> httpx.Timeout:
    read = read_timeout(times)
    return httpx.Timeout(connect=times.connect, read=read, write=read, pool=times.connect)


def _info(service: str, config: LLMConfig) -> ProviderInfo:
    if not service:
        raise ConfigError(
            f"LiteLLM does not know the provider of the model {config.model!r}: expected provider/model, such as "
            "'openai/gpt-4o' or 'anthropic/claude-sonnet-4-5'"
        )
    return info_of(config, name="LiteLLMProvider", framework="litellm", telemetry_name=telemetry_name(service))
