"""The services that can answer a call of a library: the configured service, or another that the library turned to."""

from __future__ import annotations

from urllib.parse import urlsplit

import attrs

from fluxibly.types import CallRecord, ProviderInfo


def server_of(base: object) -> tuple[str | None, int | None]:
    """Return the host and the port of a base URL; each is None if the URL does not have it."""
    try:
        address = urlsplit(base if isinstance(base, str) else "")
        return address.hostname, address.port or {"https": 443, "http": 80}.get(address.scheme)
    except ValueError:
        return None, None


class Services:
    """The services that answer a provider's calls. `own` is the configured service.

    Each service has a single description for as long as the provider lives: telemetry distinguishes them by identity.
    """

    def __init__(self, own: ProviderInfo) -> None:
        self.own = own
        self._others: dict[tuple[str, str | None, int | None], ProviderInfo] = {}

    def at(self, name: str, base: object) -> ProviderInfo:
        """Return the service with this telemetry name at a base URL. The URL is None if it is not known."""
        address, port = server_of(base)
        own = self.own
        if (name, address, port) == (own.telemetry_name, own.server_address, own.server_port):
            return own
        known = self._others.get((name, address, port))
        if known is None:
            info = attrs.evolve(own, telemetry_name=name, server_address=address, server_port=port)
            known = self._others.setdefault((name, address, port), info)  # another thread may have been first
        return known

    def named(self, name: str) -> ProviderInfo:
        """Return the configured service if it has this telemetry name, else a service without an address."""
        return self.own if name == self.own.telemetry_name else self.at(name, None)

    def note(self, call: CallRecord, service: ProviderInfo) -> None:
        """Record on the call that `service` answers, or is being asked.

        A service recorded by code around this provider stays, as long as `service` is the configured service.
        """
        if service is not self.own or any(call.provider is other for other in self._others.values()):
            call.provider = service
