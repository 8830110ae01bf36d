"""The route to a server: direct, or through a proxy that the environment sets; and the TLS context."""

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
    """The host to connect to, and additions to requests. `tunnel` is the CONNECT request for TLS through a proxy."""

    host: str
    port: int
    server_name: str | None
    """The host whose certificate TLS verifies; None for plain HTTP."""
    tunnel: bytes = b""
    prefix: bytes = b""
    """The part before the path of each request: `http://host:port` for a proxy that forwards plain HTTP."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Headers for the proxy, sent with each request that it forwards."""

    @property
    def through_proxy(self) -> bool:
        return bool(self.tunnel or self.prefix)


def proxy_for(url: httpx.URL) -> httpx.URL | None:
    """Return the proxy that the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) sets for a URL.

    Raises:
        ConfigError: the proxy's URL is invalid, or the proxy is of an unsupported kind.
    """
    proxies = getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.decode("ascii")):
        return None
    named = f"the proxy that the environment sets for {url.scheme}"
    try:
        proxy = httpx.URL(address if "://" in address else f"http://{address}")
        host = proxy.host
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"{named}: expected a valid URL ({error})") from None
    if f"{proxy.scheme}://" not in _PROXIES or not host or not 0 < (proxy.port or 1) < 65536:
        raise ConfigError(f"{named}: expected {', '.join(_PROXIES)} with a host and an optional port")
    if proxy.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ConfigError(f"{named} uses SOCKS, which requires a package: pip install 'httpx[socks]'")
    return proxy


def route_to(url: httpx.URL, proxy: httpx.URL | None) -> Route:
    """Return the route to a server, direct or through an `http://` proxy."""
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
    """Return the TLS context that all connections share. It takes 50 ms to create, so it is created on first use.

    Raises:
        ConfigError: the certificates that the environment sets cannot be read.
    """
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _tls_context(_file: str | None, _directory: str | None) -> ssl.SSLContext:
    try:
        context = httpx.create_ssl_context()  # httpx reads the two variables itself
    except OSError as error:  # an ssl.SSLError is an OSError too
        raise ConfigError(
            f"the certificates of SSL_CERT_FILE (or SSL_CERT_DIR) cannot be read: {error.strerror or error}"
        ) from None
    context.set_alpn_protocols(["http/1.1"])
    return context
