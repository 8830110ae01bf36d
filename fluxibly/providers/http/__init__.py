"""The HTTP client: providers for threads and for event loops, which run any codec. The only package with sockets.

- `_provider.py`: the providers and their streams.
- `_endpoint.py`: a service as a configuration reaches it. `_exchange.py`: requests, responses and their headers.
- `_reader.py` and `_encodings.py`: the bodies of responses. `_limits.py`: time limits. `_network_errors.py`: error messages.
- `batches.py`: batch APIs. `_listing.py`: lists of models.
- `_senders.py`: the choice of connections. `_pool.py`: the library's own connections, on `_http1.py`, `_route.py` and
  `_sockets*.py`. `_httpx.py`: any httpx transport.

Imports: `dialects`, `config`, data and its helpers. Imported by: `providers`.
"""

from fluxibly.providers.http._exchange import Authorizer, Key
from fluxibly.providers.http._httpx import end_connection
from fluxibly.providers.http._keys import Credentials, free_after_fork
from fluxibly.providers.http._provider import AsyncHTTPProvider, HTTPProvider

__all__ = [
    "AsyncHTTPProvider",
    "Authorizer",
    "Credentials",
    "HTTPProvider",
    "Key",
    "end_connection",
    "free_after_fork",
]
