"""Leases: places in a store outside of the process, which expire unless this process renews them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from weakref import ref

from fluxibly._logs import report_once
from fluxibly._threads import renew_lock_after_fork
from fluxibly.errors import error_type

LEASE = 30.0
"""The seconds after which a lease expires unless it is renewed."""


class Leases:
    """The leases that this process holds in one store. A daemon thread renews them, three times in the life of a lease.

    The thread starts with the first lease and ends once none is held. Once the main thread has ended, it may not start: the
    process is about to end, and what its last calls hold ends with its time. A forked process begins without leases.

    Args:
        renew: renews the lease of a key and a caller; it returns whether the lease was still held. It must not refer to
            the store, which could not be collected while the thread runs.
        seconds: the seconds after which a lease expires unless it is renewed.
        store: the name of the store's class.
    """

    def __init__(self, renew: Callable[[str, str], bool], seconds: float, store: str) -> None:
        self._renew = renew
        self._seconds = seconds
        self._store = store
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Make a new lock, and forget the leases and the thread, which a forked process does not have."""
        self._lock = threading.RLock()  # reentrant, because a signal handler may close a stream
        self._held: dict[tuple[str, str], None] = {}
        self._thread: threading.Thread | None = None

    def hold(self, key: str, who: str) -> None:
        """Renew a lease from now on."""
        with self._lock:
            self._held[key, who] = None
            if self._thread is None:
                name = f"fluxibly leases {self._store}"
                self._thread = threading.Thread(
                    target=_keep, args=(ref(self), self._seconds / 3), name=name, daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError:  # from Python 3.12 on, no thread starts once the main thread has ended
                    self._thread = None

    def drop(self, key: str, who: str) -> None:
        """Stop renewing a lease."""
        self._held.pop((key, who), None)

    def renew_all(self) -> bool:
        """Renew all leases. Return False, and forget the thread, if there are none."""
        with self._lock:
            if not self._held:
                self._thread = None
                return False
        for key, who in [*self._held]:
            if (key, who) in self._held:
                self._renew_one(key, who)
        return True

    def _renew_one(self, key: str, who: str) -> None:
        try:
            why = "" if self._renew(key, who) else "the store has forgotten it"
        except Exception as error:  # noqa: BLE001  # a server fails in many ways, and the thread has other leases
            why = f"the store failed with {error_type(error)}"
        if why and (key, who) in self._held:  # else the call has ended meanwhile
            report_once(
                f"lease {self._store}",
                f"{self._store}: a lease could not be renewed ({why}); its call goes on, and another may take its place",
            )


def _keep(of: ref[Leases], pause: float) -> None:
    """Renew leases until there are none. While the thread sleeps, it holds no reference to them."""
    while True:
        time.sleep(pause)
        leases = of()
        if leases is None or not leases.renew_all():
            return
        del leases
