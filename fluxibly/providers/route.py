"""How a server is reached: straight, or through a proxy that the environment names; and TLS on the way."""

from __future__ import annotations

import base64
import functools
import os
import ssl
from typing import NamedTuple
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import httpx

from fluxibly.errors import ConfigError


class Route(NamedTuple):
    """The host to connect to, and what to say there. `tunnel` is the CONNECT request, where TLS goes through a proxy."""

    host: str
    port: int
    server_name: str | None
    """The host that TLS has to prove; None for plain HTTP."""
    tunnel: bytes = b""
    prefix: bytes = b""
    """Stands before the path of each request: `http://host:port`, for a proxy that forwards plain HTTP."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """For the proxy, with each request that it forwards."""


def proxy_for(url: httpx.URL) -> httpx.URL | None:
    """The proxy that the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) sets for a URL.

    Raises:
        ConfigError: it is no URL.
    """
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.netloc.decode("ascii")):
        return None
    try:
        return httpx.URL(proxy if "://" in proxy else f"http://{proxy}")
    except httpx.InvalidURL as error:
        raise ConfigError(f"the proxy that the environment names for {url.scheme} is not a URL: {error}") from None


def route_to(url: httpx.URL, proxy: httpx.URL | None) -> Route:
    """The route to a server, straight or through an `http://` proxy."""
    host = url.raw_host.decode("ascii")
    secure = url.scheme == "https"
    port = url.port or (443 if secure else 80)
    if proxy is None:
        return Route(host, port, host if secure else None)
    at = b"[%b]:%d" if ":" in host else b"%b:%d"
    authority = at % (url.raw_host, port)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if proxy.userinfo:
        credentials = f"{unquote(proxy.username)}:{unquote(proxy.password)}".encode()
        headers = ((b"proxy-authorization", b"Basic " + base64.b64encode(credentials)),)
    proxy_host, proxy_port = proxy.raw_host.decode("ascii"), proxy.port or 80
    if not secure:
        return Route(proxy_host, proxy_port, None, prefix=b"http://" + url.netloc, headers=headers)
    fields = b"".join(b"%b: %b\r\n" % header for header in ((b"host", authority), *headers))
    return Route(proxy_host, proxy_port, host, tunnel=b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (authority, fields))


def tls_context() -> ssl.SSLContext:
    """The context that all connections share: it takes 50 ms to make, so it is made late, and once."""
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _tls_context(_file: str | None, _directory: str | None) -> ssl.SSLContext:
    context = httpx.create_ssl_context()  # it reads these two variables itself
    context.set_alpn_protocols(["http/1.1"])
    return context
