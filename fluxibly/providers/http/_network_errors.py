"""Errors of the network in the words of users: the host, the failure, and the remedy."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import cast

import httpx

from fluxibly.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    Phase,
    ProviderError,
    RequestTimeout,
    StreamProtocolError,
    StreamStalled,
)
from fluxibly.limits import KEEP_ALIVES, Leash, before_the_deadline, who_limits
from fluxibly.providers.http._limits import ConnectionLost, LimitPassed, Limits, NotHTTP

_PROGRAMS = {
    "llamacpp": "llama.cpp (llama-server)",
    "lmstudio": "LM Studio's server (lms server start)",
    "ollama": "Ollama (ollama serve)",
    "ollama-generate": "Ollama (ollama serve)",
    "vllm": "vLLM (vllm serve)",
}
"""The servers that run on the user's machine, by framework."""
_ADDRESS = re.compile(r"\('([0-9A-Fa-f.:]+)', ([0-9]+)")
"""The address in the messages of asyncio and trio."""


def translated(
    error: Exception, host: str, port: int, limits: Limits, *, framework: str = "", leash: Leash | None = None
) -> ProviderError | None:
    """Return the error that users catch for an error of a socket, TLS, httpx or this package; None for other errors.

    `leash` is that of the call, which knows who has set a limit.
    """
    if isinstance(error, ProviderError):
        return error
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(error, (LimitPassed, httpx.TimeoutException)):
        return _late(error, where, limits, leash)
    if isinstance(error, ConnectionLost):
        if error.silent:
            return ConnectionFailed(f"{where} closed the connection without a response")
        return StreamProtocolError(f"{where} closed the connection in the middle of its response")
    if isinstance(error, NotHTTP):
        return StreamProtocolError(f"{where} sent an invalid HTTP response: {error}")
    if isinstance(error, (httpx.TransportError, OSError)):
        if refused_here(error, host, port):
            program = _PROGRAMS.get(framework, "it")
            return ConnectionFailed(
                f"no server listens at {where} (connection refused): start {program}, or set api_base to its address",
                retryable=False,  # nobody starts it in the meantime
            )
        return _of_network(error, where, host)
    return None


def _late(error: Exception, where: str, limits: Limits, leash: Leash | None) -> RequestTimeout:
    if isinstance(error, httpx.TimeoutException):
        limits.passed_in_httpx(connecting=isinstance(error, (httpx.ConnectTimeout, httpx.PoolTimeout)))
    phase = limits.passed
    if phase == "deadline":
        return _at_deadline(where, limits.phase, leash)
    value = limits.value()
    within = "" if value is None else f" within {value:g} s"
    stalled = phase == "idle" and limits.streaming
    who = who_limits(leash, phase)
    message = {
        "connect": f"no connection to {where}{within} (the limit timeout.connect)",
        "first_byte": f"{where} did not begin its response{within} (the limit timeout.first_byte)",
        "first_chunk": f"{where} sent no output{within} (the limit first_chunk of {who})",
        "idle": f"{where} sent no more of its response{within} (the limit timeout.idle)",
        "total": f"{where} did not finish its response{within} (the limit timeout.total)",
    }[phase]
    if stalled and limits.strict:
        message = f"{where} sent no chunk{within} (the limit idle of {who})"
    elif stalled and value is not None:
        message = f"{where} sent no event{within} (the limit timeout.idle)"
        if limits.only_kept_alive:
            message = (
                f"{where} sent only keep-alives for {KEEP_ALIVES * value:g} s "
                f"({KEEP_ALIVES} times the limit timeout.idle)"
            )
    timeout = StreamStalled(message) if stalled else RequestTimeout(message)
    timeout.phase = phase
    return timeout


def _at_deadline(where: str, phase: Phase, leash: Leash | None) -> DeadlineExceeded:
    what = {
        "connect": f"no connection to {where}",
        "first_byte": f"{where} did not begin its response",
    }.get(phase, f"{where} did not finish its response")
    return DeadlineExceeded(f"{what} {before_the_deadline(leash)}; give the call more time")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, the outermost first."""
    for _ in range(8):
        if error is None:
            return
        yield error
        if isinstance(error, BaseExceptionGroup):
            # The attempts to connect to each address. A refusal says most.
            attempts = cast("BaseExceptionGroup[BaseException]", error).exceptions
            yield from sorted(attempts, key=lambda attempt: not isinstance(attempt, ConnectionRefusedError))
        error = error.__cause__ or error.__context__


def refused_here(error: Exception, host: str, port: int) -> bool:
    """Whether this machine has refused the connection to a host, because no server listens at the port."""
    for cause in _chain(error):
        if isinstance(cause, ConnectionRefusedError):
            # The names and addresses of other machines, such as a proxy's, are not the host's.
            found = _ADDRESS.search(str(cause))
            address = found[1] if found and int(found[2]) == port else cause.filename
            return _is_here(host) or (isinstance(address, str) and _is_here(address))
    return False


def _is_here(host: str) -> bool:
    """Whether a host is a name or an address of this machine's loopback."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or address.is_unspecified


def note_address(error: Exception, host: str) -> None:
    """Note the address of a host in its refusal, which has none in threads. Looking it up may wait."""
    for cause in _chain(error):
        if isinstance(cause, ConnectionRefusedError) and cause.filename is None:
            with contextlib.suppress(OSError, UnicodeError):
                cause.filename = socket.getaddrinfo(host, None)[0][4][0]


def _of_network(error: Exception, where: str, host: str) -> ProviderError:
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConnectionFailed(
                f"the certificate of {where} is not trusted: {cause.verify_message}; "
                "for a private authority, set the environment variable SSL_CERT_FILE to its certificate",
                retryable=False,
            )
        if isinstance(cause, ssl.SSLError):
            return ConnectionFailed(f"no secure connection to {where}: {cause.reason or 'TLS failed'}")
        if isinstance(cause, socket.gaierror):
            return ConnectionFailed(f"the host {host} was not found: {cause.strerror}")
        if isinstance(cause, ConnectionRefusedError):
            return ConnectionFailed(f"{where} refused the connection: is the server running, and is api_base right?")
        if isinstance(cause, (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
            return ConnectionFailed(f"{where} reset the connection")
        if isinstance(cause, OSError) and cause.errno is not None:
            return ConnectionFailed(f"the connection to {where} failed: {_plain(cause)}")
    if isinstance(error, httpx.ProxyError):
        return ConnectionFailed(f"the proxy in front of {where} refused the connection: {error}")
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConnectionFailed(f"{where} cannot be reached: {error}", retryable=False)
    if isinstance(error, httpx.RemoteProtocolError):
        return StreamProtocolError(f"{where} cut its response off, or sent an invalid HTTP response: {error}")
    if isinstance(error, httpx.ConnectError):
        return ConnectionFailed(f"no connection to {where}: {str(error) or 'connecting failed'}")
    return ConnectionFailed(f"the connection to {where} was lost: {str(error) or type(error).__name__}")


def _plain(error: OSError) -> str:
    if error.errno == errno.ETIMEDOUT:
        return "the network timed out"
    return error.strerror or type(error).__name__


def redirected(status: int, headers: Mapping[str, str]) -> ProviderError:
    """Return the error of a 3xx. Redirects are not followed, because the API key would go to the other server."""
    target = headers.get("location", "").partition("?")[0]
    to = f" to {target}" if target else ""
    return ProviderError(
        f"the server redirects{to} (status {status}), which is not followed, so that no other server gets the API key: "
        "set api_base to the service's address",
        status=status,
    )
