"""The server: the addresses that it listens at, and uvicorn."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

GRACE: Final = 3
"""Seconds in which answers under way may come to their end when the server ends."""
BACKLOG: Final = 2048


@attrs.frozen
class Address:
    """The sockets that a server listens at."""

    sockets: Sequence[socket.socket]
    host: str
    port: int
    is_loopback: bool
    """Whether only programs on this machine can reach the server."""

    @property
    def url(self) -> str:
        """The address for clients, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104  # it is the name of any address
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def close(self) -> None:
        """Listen no more."""
        for each in self.sockets:
            each.close()


def listen(host: str, port: int, *, public: bool) -> Address:
    """Listen at an address.

    Args:
        host: a name or an IP address of this machine.
        port: the port; 0 takes one that is free.
        public: whether programs on other machines may reach it.

    Raises:
        ConfigError: there is no such address, it is in use, or other machines could reach it, though it is not `public`.
    """
    if not host.strip():
        raise ConfigError("--host: expected a name or an address of this machine, got an empty str")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host: expected a name or an address of this machine, got {host!r}: {_reason(error)}"
        ) from None
    places = list(dict.fromkeys((family, place) for family, _, _, _, place in found))
    loopback = all(ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback for _, place in places)
    if not loopback and not public:
        raise ConfigError(
            f"--host {host}: other machines can reach this address, so a token is needed; set FLUXIBLY_SERVE_TOKEN, or "
            "give --token"
        )
    sockets: list[socket.socket] = []
    try:
        for family, place in places:
            sockets.append(_listener(family, (place[0], port, *place[2:])))
            port = port or sockets[0].getsockname()[1]
    except OSError as error:
        for each in sockets:
            each.close()
        raise ConfigError(f"cannot listen at {host}, port {port}: {_reason(error)}") from None
    return Address(sockets, host, port, loopback)


def _listener(family: int, place: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(signal, "SIGHUP"):  # on Windows it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(place)
        listener.listen(BACKLOG)  # now, so that nobody is refused who has read the line that tells the address
    except BaseException:
        listener.close()
        raise
    return listener


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def run(app: ASGIApp, address: Address, started: Callable[[], object]) -> None:
    """Serve an application until Ctrl-C or SIGTERM. Answers under way get `GRACE` seconds; a second Ctrl-C gives them none.

    `started` is called when requests are answered and signals end the server.

    Raises:
        KeyboardInterrupt: Ctrl-C has ended the server.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,  # its lines have the query of each request; `_gate` has lines of its own
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    # When uvicorn has ended, it sends itself the signal again, and SIGTERM would leave no time to export spans.
    before = signal.signal(signal.SIGTERM, _nothing)
    try:
        Server(config).run(list(address.sockets))
    finally:
        signal.signal(signal.SIGTERM, before)
        address.close()


def _nothing(*_: object) -> None:
    """Do nothing at the signal that has ended the server."""
