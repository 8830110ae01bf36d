"""The HTTP clients that LiteLLM keeps for the whole process: a cache, and a permanent client of each kind.

Others may use the same client, so clients are never closed themselves. Only their connections are closed, and a client
opens new connections when it is used again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast


def close_idle(litellm: Any) -> None:
    """Close the connections of the synchronous clients that have no request in flight."""
    for _, transport in _transports(litellm):
        if hasattr(transport, "handle_request") and not _busy(transport):
            transport.close()


async def aclose_idle(litellm: Any) -> None:
    """Close the connections of the running event loop's clients that have no request in flight."""
    for transport in _of_this_loop(litellm):
        if not _busy(transport):
            await transport.aclose()


async def aclose_all(litellm: Any) -> None:
    """Close the connections of all clients of the running event loop, which is about to end."""
    for transport in _of_this_loop(litellm):
        await transport.aclose()


def _of_this_loop(litellm: Any) -> list[Any]:
    loop = asyncio.get_running_loop()
    suffix = f"-{id(loop)}"  # LiteLLM appends it to the keys of its cache
    return [
        transport
        for key, transport in _transports(litellm)
        if hasattr(transport, "handle_async_request") and (key.endswith(suffix) or _loop_of(transport) is loop)
    ]


def _transports(litellm: Any) -> Iterator[tuple[str, Any]]:
    """Yield the transports of LiteLLM's clients, also those for proxies, each with its client's key in the cache."""
    cache: dict[str, Any] = getattr(getattr(litellm, "in_memory_llm_clients_cache", None), "cache_dict", {})
    known = cast("dict[str, Any]", vars(litellm))
    lasting = [(name, known.get(name)) for name in ("module_level_client", "module_level_aclient")]
    for key, held in [*cache.items(), *lasting]:
        for transport in _transports_of(held):
            yield key, transport


def _transports_of(held: Any) -> list[Any]:
    client: Any = getattr(held, "_client", None) or getattr(held, "client", None) or held  # an SDK's or a handler's
    return [getattr(client, "_transport", None), *getattr(client, "_mounts", {}).values()]


def _loop_of(transport: Any) -> object:
    """Return the event loop of a transport based on aiohttp, which LiteLLM uses unless it is switched off."""
    return getattr(getattr(transport, "client", None), "_loop", None)


def _busy(transport: Any) -> bool:
    """Whether a request is in flight, in httpcore's pool or in aiohttp's session."""
    connections = getattr(getattr(transport, "_pool", None), "connections", ())
    connector = getattr(getattr(transport, "client", None), "connector", None)
    return any(not connection.is_idle() for connection in connections) or bool(getattr(connector, "_acquired", None))
