"""Which service answers a call of a library's: the configured one, or another that the library turned to."""

from __future__ import annotations

from urllib.parse import urlsplit

import attrs

from fluxibly.types import CallRecord, ProviderInfo


def server_of(base: object) -> tuple[str | None, int | None]:
    """Host and port of a base URL, as far as it tells them."""
    try:
        address = urlsplit(base if isinstance(base, str) else "")
        return address.hostname, address.port or {"https": 443, "http": 80}.get(address.scheme)
    except ValueError:
        return None, None


class Services:
    """The services that one provider gets its answers from, `own` the configured one.

    Each is described by one object for as long as the provider lives: telemetry tells them apart by identity.
    """

    def __init__(self, own: ProviderInfo) -> None:
        self.own = own
        self._others: dict[tuple[str, str | None, int | None], ProviderInfo] = {}

    def at(self, name: str, base: object) -> ProviderInfo:
        """The service of that name in telemetry, at a base URL; None if that is not known."""
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
        """The service of that name in telemetry: the configured one if it is its, else one whose address is not known."""
        return self.own if name == self.own.telemetry_name else self.at(name, None)

    def tell(self, call: CallRecord, service: ProviderInfo) -> None:
        """Tell the call that `service` answers, or is being asked.

        What somebody around this provider said of it stays, as long as it is the configured service.
        """
        if service is not self.own or any(call.provider is other for other in self._others.values()):
            call.provider = service
