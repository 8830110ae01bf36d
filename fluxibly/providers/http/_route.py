"""How a server is reached: straight, or through a proxy that the environment names; and TLS on the way."""

from __future__ import annotations

import base64
import functools
import os
import ssl
from importlib.util import find_spec
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpx

from fluxibly.errors import ConfigError

_PROXIES = ("http://", "https://", "socks5://", "socks5h://")


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

    @property
    def through_proxy(self) -> bool:
        return bool(self.tunnel or self.prefix)


def proxy_for(url: httpx.URL) -> httpx.URL | None:
    """The proxy that the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) sets for a URL.

    Raises:
        ConfigError: it is no URL, or none of a proxy that can be used.
    """
    proxies = getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.decode("ascii")):
        return None
    named = f"the proxy that the environment names for {url.scheme}"
    try:
        proxy = httpx.URL(address if "://" in address else f"http://{address}")
        host = proxy.host
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"{named} is not a URL: {error}") from None
    if f"{proxy.scheme}://" not in _PROXIES or not host or not 0 < (proxy.port or 1) < 65536:
        raise ConfigError(f"{named} has to be {', '.join(_PROXIES)}, with a host and maybe a port")
    if proxy.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ConfigError(f"{named} speaks SOCKS, which needs a package: pip install 'httpx[socks]'")
    return proxy


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
        credentials = f"{proxy.username}:{proxy.password}".encode()
        headers = ((b"proxy-authorization", b"Basic " + base64.b64encode(credentials)),)
    proxy_host, proxy_port = proxy.raw_host.decode("ascii"), proxy.port or 80
    if not secure:
        return Route(proxy_host, proxy_port, None, prefix=b"http://" + url.netloc, headers=headers)
    fields = b"".join(b"%b: %b\r\n" % header for header in ((b"host", authority), *headers))
    return Route(proxy_host, proxy_port, host, tunnel=b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (authority, fields))


def tls_context() -> ssl.SSLContext:
    """The context that all connections share: it takes 50 ms to make, so it is made late, and once.

    Raises:
        ConfigError: the certificates that the environment names cannot be read.
    """
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _tls_context(_file: str | None, _directory: str | None) -> ssl.SSLContext:
    try:
        context = httpx.create_ssl_context()  # it reads these two variables itself
    except OSError as error:  # ssl's own errors are such
        raise ConfigError(
            f"the certificates of SSL_CERT_FILE (or SSL_CERT_DIR) cannot be read: {error.strerror or error}"
        ) from None
    context.set_alpn_protocols(["http/1.1"])
    return context
