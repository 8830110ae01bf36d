"""The HTTP client: two shells, for threads and for event loops, that run any codec. The only room with sockets.

`_provider.py` has the shells, `_endpoint.py` a service as one configuration reaches it, `_exchange.py` what goes out
and comes in; `_reader.py` and `_encodings.py` read answers; `_limits.py` and `_failures.py` say when and why it went
wrong. Connections: `_senders.py` chooses, `_pool.py` keeps our own (`_http1.py`, `_route.py`, `_sockets*.py`),
`_httpx.py` takes any httpx transport. Imports: `dialects`, `config`, data. Imported by: `providers`.
"""

from fluxibly.providers.http._httpx import end_connection
from fluxibly.providers.http._provider import AsyncHTTPProvider, HTTPProvider

__all__ = ["AsyncHTTPProvider", "HTTPProvider", "end_connection"]
