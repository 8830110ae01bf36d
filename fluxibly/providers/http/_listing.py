"""The models that a service lists, page by page, within one time limit."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import httpx

from fluxibly.errors import ProviderError, RequestTimeout, StreamProtocolError
from fluxibly.limits import Timeouts
from fluxibly.providers.dialects.model_lists import MAX_MODELS, MAX_PAGE, MAX_PAGES
from fluxibly.providers.http._limits import Limits
from fluxibly.providers.http._network_errors import translated
from fluxibly.providers.http._reader import ReplyBody, refusal
from fluxibly.providers.http._senders import default_sender

if TYPE_CHECKING:
    from fluxibly.providers.dialects.model_lists import ModelList
    from fluxibly.providers.http._endpoint import Endpoint
    from fluxibly.providers.http._exchange import Sender
    from fluxibly.types import Request


async def listed(
    endpoint: Endpoint, sender: Sender | None, request: Request, *, end: float, seconds: float
) -> list[str]:
    """Return the names in all lists of a service, sorted.

    Args:
        sender: carries the requests; None for connections of their own, because a list may be on another host.
        request: errors are completed for it; nothing of it is sent.
        end: the monotonic time at which the lists have to be there; `seconds` says in errors how long that is.

    Raises:
        ProviderError: the service is not reached, refuses, takes too long, or sends no list.
    """
    names = set[str]()
    for models in endpoint.service.lists:
        carrier = sender or default_sender(httpx.URL(models.url(str(endpoint.url))))
        try:
            names |= await _names(endpoint, models, carrier, request, end)
        except RequestTimeout as error:
            late = RequestTimeout(f"{endpoint.host} sent no whole list within {seconds:g} s")
            raise endpoint.completed_with(late, request) from error
        except ProviderError as error:
            raise endpoint.completed_with(error, request) from error.__cause__
        finally:
            if carrier is not sender:
                await carrier.close()
    return sorted(names)


async def _names(endpoint: Endpoint, models: ModelList, sender: Sender, request: Request, end: float) -> set[str]:
    names, cursor = set[str](), ""
    for _ in range(MAX_PAGES):
        url = httpx.URL(models.url(str(endpoint.url), cursor))
        found, cursor = models.read(await _body(endpoint, url, sender, request, end))
        names.update(found)
        if len(names) > MAX_MODELS:
            raise StreamProtocolError(f"expected at most {MAX_MODELS:,} models, got more", retryable=False)
        if not cursor:
            return names
    raise StreamProtocolError(f"expected at most {MAX_PAGES} pages of models, got more", retryable=False)


async def _body(endpoint: Endpoint, url: httpx.URL, sender: Sender, request: Request, end: float) -> bytes:
    """Return the body of a page."""
    left = max(end - monotonic(), 0.001)
    limits = Limits(Timeouts(connect=left, first_byte=left, idle=left), total=left)
    try:
        exchange = await sender.send(endpoint.getting(url), limits)
        try:
            if not 200 <= exchange.status < 300:
                raise await refusal(endpoint, exchange, request, limits)
            endpoint.check_page(exchange.headers)
            body = ReplyBody(exchange.headers, limit=MAX_PAGE)
            while data := await exchange.read():
                body.add(data)
            return body.whole()
        finally:
            await exchange.release(ended=False)
    except Exception as error:
        port = url.port or (443 if url.scheme == "https" else 80)
        ours = translated(error, url.host, port, limits, framework=endpoint.service.framework)
        if ours is None or ours is error:
            raise
        raise ours from error
