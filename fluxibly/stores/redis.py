"""`RedisStore`: what the calls of any number of processes and machines share, on a Redis server."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from fluxibly._checks import kind_of, number, shown_url
from fluxibly._extras import pip_install
from fluxibly._threads import renew_lock_after_fork
from fluxibly.errors import ConfigError
from fluxibly.stores import _redis_scripts as scripts
from fluxibly.stores._leases import LEASE, Leases
from fluxibly.stores._queues import GRACE, PLACE_GRACE
from fluxibly.stores._worker_threads import WorkerThreads
from fluxibly.stores.protocol import PARTS, Entry, Limit, Turn

_CONNECT = 0.5
"""The most seconds to wait for a connection."""
_ANSWER = 1.0
"""The most seconds to wait for an answer."""
_SILENT = 1.0
"""The seconds for which a server is not asked again once a trip has timed out."""
_CONNECTIONS = 32
"""The most connections of a store. A trip takes less than a millisecond, so that this many serve many more threads."""
_THREADS = 16
"""The most threads of one event loop that wait for the server."""
_FOR_GOOD = 10 * 366 * 86_400.0
"""The seconds after which what is kept for good is forgotten, unless it is written again."""
_LONGEST = 1e10
"""The longest time in seconds. More would overflow in the server."""
_LONGEST_LEASE = 86_400.0


class RedisStore:
    """A store on a Redis server (5 or later) or Valkey, for any number of threads, processes and machines.

    Each method is one trip to the server, and atomic there. Times are those of the server's clock. Every key has an
    expiry and a hash tag. The connections are opened at the first use, at most 32 in each process. A server that does not
    answer within a second has failed, for `on_store_error` of the middleware.

    What is kept for good (values without a time, and sums) is forgotten ten years after it was written last. Amounts are
    exact up to 2**53.

    Args:
        url: `redis://user:password@host:6379/0`, `rediss://…` for TLS, which is verified, or `unix:///path/to.sock?db=0`.
            The options of redis-py may follow, such as `?socket_timeout=5`.
        lease_seconds: the seconds for which a place stays taken if its process dies, from 1 to 86,400. Living processes renew
            their places.

    Raises:
        ConfigError: the URL is wrong, or the package redis is missing.
    """

    local = False

    def __init__(self, url: str, *, lease_seconds: float = LEASE) -> None:
        found = number("lease_seconds", lease_seconds, 1, _LONGEST_LEASE, unit="seconds")
        if found is not None:
            raise ConfigError(f"RedisStore: {found}")
        _check_url(url)
        self._url = url
        self.lease_seconds = lease_seconds
        self._connections = _Connections(url)
        # Not a method of this store, which would live until the garbage collector runs.
        self._leases = Leases(partial(_renew, self._connections, lease_seconds), lease_seconds, type(self).__name__)
        self._threads = WorkerThreads(_THREADS)
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Forget who has asked: in a forked process, these are the parent's callers."""
        self._asked: dict[tuple[str, str], None] = {}
        """The keys and callers that may hold a place or wait."""

    def __reduce__(self) -> tuple[Callable[..., RedisStore], tuple[str]]:
        return partial(RedisStore, lease_seconds=self.lease_seconds), (self._url,)

    def __repr__(self) -> str:
        lease = "" if self.lease_seconds == LEASE else f", lease_seconds={self.lease_seconds:g}"
        return f"{type(self).__name__}({masked_url(self._url)!r}{lease})"

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        self._connections.close()

    # Limits

    def reserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        """Take what a call costs of several limits; see `Store.reserve`.

        The estimated wait is exact for up to 50 calls ahead; more count as these do on average.
        """
        self._asked[key, who] = None
        args: list[str | bytes] = [_encoded(who), _microseconds(GRACE)]
        for name, rate, burst, cost in limits:
            args += (_encoded(name), _text(rate), _text(burst), _text(cost))
        answer = self._connections.run(
            scripts.RESERVE, key, ("limits", "limits:queue", "limits:seen", "limits:costs"), args
        )
        if answer is None:
            self._asked.pop((key, who), None)
            return None
        wait, ahead = answer
        return Turn(float(wait) / 1e6, ahead, None)

    def correct(self, key: str, limit: Limit, now: float) -> None:
        """Take more of a limit, or give it back; see `Store.correct`."""
        self._connections.run(
            scripts.CORRECT, key, ("limits",), (_encoded(limit.name), _text(limit.rate), _text(limit.cost))
        )

    def throttle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        """Slow a limit down for a while; see `Store.throttle`."""
        if rate <= 0:
            self._connections.run(scripts.CLOSE, key, ("limits",), (_microseconds(seconds),))
        else:
            self._connections.run(
                scripts.SLOW_DOWN, key, ("limits",), (_encoded(name), _text(rate), _microseconds(seconds))
            )

    # Places

    def lease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        """Take one of several places; see `Store.lease`. It is held for `lease_seconds`, and renewed by this process."""
        self._asked[key, who] = None
        args = (
            _encoded(who),
            _text(size),
            _microseconds(self.lease_seconds),
            _microseconds(PLACE_GRACE),
            "1" if wait else "0",
        )
        ahead = self._connections.run(scripts.LEASE, key, ("places", "places:queue", "places:seen"), args)
        if ahead is None:
            self._leases.hold(key, who)
            return None
        return Turn(math.inf, ahead, None)

    def renew(self, key: str, who: str, now: float) -> bool:
        """Hold a place for `lease_seconds` from now on. Return whether it was still held."""
        return _renew(self._connections, self.lease_seconds, key, who)

    def release(self, key: str, who: str, now: float) -> None:
        """Give a place back, or leave a queue; see `Store.release`.

        A caller of another process, from which this one was forked, keeps what it has.
        """
        if (key, who) not in self._asked:
            return
        self._leases.drop(key, who)
        kinds = ("places", "places:queue", "places:seen", "limits:queue", "limits:seen", "limits:costs")
        self._connections.run(scripts.RELEASE, key, kinds, (_encoded(who),))
        self._asked.pop((key, who), None)

    # Sums

    def add(self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None) -> float | None:
        """Add to a sum; see `Store.add`. Whole amounts are exact up to 2**53."""
        args = (
            _text(amount),
            "" if most is None else _text(most),
            "" if per is None else _microseconds(per),
            "" if per is None else _microseconds(per / PARTS),
            _microseconds(_FOR_GOOD),
        )
        total = self._connections.run(scripts.ADD, key, ("sum", "sum:parts"), args)
        return None if total is None else float(total)

    # Values

    def load(self, key: str, now: float) -> Entry | None:
        """Return the value under a key, or None; see `Store.load`."""
        name = _name(key, "value")
        value, left = self._connections.ask(("GET", name), ("PTTL", name))
        if value is None or left < 0:  # it may expire between the two
            return None
        return Entry(value, math.inf if left > _FOR_GOOD * 500 else left / 1000)

    def save(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        """Keep a value; see `Store.save`."""
        if value is None:
            self._connections.ask(("DEL", *[_name(key, kind) for kind in ("value", "sum", "sum:parts")]))
            return
        milliseconds = math.ceil(min(_FOR_GOOD if seconds is None else seconds, _FOR_GOOD) * 1000)
        self._connections.ask(("SET", _name(key, "value"), value, "PX", max(milliseconds, 1)))

    # The twins

    async def areserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        return await self._threads.run(partial(self.reserve, key, who, limits, now))

    async def acorrect(self, key: str, limit: Limit, now: float) -> None:
        await self._threads.run(partial(self.correct, key, limit, now))

    async def athrottle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        await self._threads.run(partial(self.throttle, key, name, rate, seconds, now))

    async def alease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        return await self._threads.run(partial(self.lease, key, who, size, now, wait=wait))

    async def arenew(self, key: str, who: str, now: float) -> bool:
        return await self._threads.run(partial(self.renew, key, who, now))

    async def arelease(self, key: str, who: str, now: float) -> None:
        await self._threads.run(partial(self.release, key, who, now))

    async def aadd(
        self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None
    ) -> float | None:
        return await self._threads.run(partial(self.add, key, amount, per, now, most=most))

    async def aload(self, key: str, now: float) -> Entry | None:
        return await self._threads.run(partial(self.load, key, now), abandon=True)

    async def asave(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        await self._threads.run(partial(self.save, key, value, seconds, now))


def _renew(connections: _Connections, lease_seconds: float, key: str, who: str) -> bool:
    """Hold a place for `lease_seconds` from now on. Return whether it was still held."""
    args = (_encoded(who), _microseconds(lease_seconds))
    return bool(connections.run(scripts.RENEW, key, ("places",), args))


class _Connections:
    """The connections of a store, each for one thread at a time. They are opened when they are needed.

    It replaces redis-py's pools, whose locks are not reentrant: a signal handler may close a stream in the midst of another
    trip.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis import exceptions
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError(f"RedisStore needs redis, which is not installed: {pip_install('redis')}") from None
        self.unknown_script: type[Exception] = exceptions.NoScriptError
        self._failure: type[Exception] = exceptions.ConnectionError
        self._timeout: type[Exception] = exceptions.TimeoutError
        self._silent_at = -math.inf
        """When a trip timed out last."""
        self._stranger: type[Exception] = exceptions.AuthenticationError
        settings: dict[str, Any] = {
            "retry": Retry(NoBackoff(), 0),
            "socket_connect_timeout": _CONNECT,
            "socket_timeout": _ANSWER,
            "protocol": 2,  # a later one needs Redis 6
        }
        if url.startswith("rediss:"):
            settings["ssl_check_hostname"] = True  # older versions of redis-py do not
        try:
            pools: Any = redis.ConnectionPool
            pool = pools.from_url(url, **settings)
            self._patience: float = pool.connection_kwargs["socket_timeout"]  # which the URL may set
            self._make: Callable[[], Any] = partial(pool.connection_class, **pool.connection_kwargs)
            self._make()  # opens nothing, and finds options that do not exist
        except Exception as error:  # noqa: BLE001  # each option has its own
            why = "unknown option" if "unexpected keyword" in str(error) else type(error).__name__
            raise ConfigError(
                f"RedisStore: expected a URL that redis-py understands, got {masked_url(url)!r} ({why}); "
                f"write {_EXAMPLE!r}, for example"
            ) from None
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Forget all connections: in a forked process, these are the parent's."""
        self._idle: list[Any] = []
        self._free: SimpleQueue[None] = SimpleQueue()
        """As many items as connections may still be in use. Its methods are reentrant."""
        for _ in range(_CONNECTIONS):
            self._free.put(None)

    def close(self) -> None:
        """Close the connections that are not in use."""
        with suppress(IndexError):
            while True:
                self._idle.pop().disconnect()

    def ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send commands in one trip, and return the answers."""
        idle, free = self._idle, self._free  # a forked process has others
        try:
            free.get(timeout=self._patience)
        except Empty:
            raise self._failure(f"all {_CONNECTIONS} connections are in use") from None
        try:
            # Otherwise all callers, and all middleware with this store, would wait in turn to find out that it is silent.
            if time.monotonic() < self._silent_at + _SILENT:
                raise self._timeout("the server did not answer another call just now")
            connection = self._opened(idle)
            try:
                connection.send_packed_command(connection.pack_commands(commands))
                answers = [connection.read_response() for _ in commands]
            except BaseException as error:
                connection.disconnect()  # its answer may still come
                if isinstance(error, self._timeout):
                    self._silent_at = time.monotonic()
                if "unauthenticated" in str(error):  # the server rejects long commands before authentication
                    raise self._stranger("the server wants a password") from None
                raise
            idle.append(connection)
            return answers
        finally:
            free.put(None)

    def run(self, script: scripts.Script, key: str, kinds: Iterable[str], args: Iterable[str | bytes]) -> Any:
        """Run a script with some of the keys of a key, and return its answer."""
        names = [_name(key, kind) for kind in kinds]
        rest = (len(names), *names, *args)
        try:
            [answer] = self.ask(("EVALSHA", script.sha, *rest))
        except self.unknown_script:  # a new server, or somebody's SCRIPT FLUSH
            [answer] = self.ask(("EVAL", script.text, *rest))
        return answer

    def _opened(self, idle: list[Any]) -> Any:
        """Return a connection that is still open, or a new one, which opens itself."""
        with suppress(IndexError):
            while True:
                connection = idle.pop()
                with suppress(self._failure):
                    if not connection.can_read():
                        return connection
                connection.disconnect()  # an idle connection is readable only if the server has closed it
        return self._make()


_EXAMPLE = "redis://localhost:6379/0"


def _check_url(url: object) -> None:
    """Check what redis-py would ignore.

    Raises:
        ConfigError: it is wrong.
    """
    what = f"RedisStore: expected a URL such as {_EXAMPLE!r}"
    if not isinstance(url, str):
        raise ConfigError(f"{what}, got {kind_of(url)}")
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError(f"{what}, rediss://… or unix://…, got {masked_url(url)!r}")
    try:
        found = urlsplit(url)
        path = found.path
    except ValueError:
        raise ConfigError(f"{what}, got {masked_url(url)!r}") from None
    if found.scheme == "unix":
        if len(path) < 2:
            raise ConfigError(
                "RedisStore: expected the path of a socket after 'unix://'; write 'unix:///run/redis.sock'"
            )
    elif "@" in path + found.fragment:
        raise ConfigError(
            f"{what}, got {masked_url(url)!r} with '/' or '#' in its password; percent-encode it, such as '/' as %2F"
        )
    elif not re.fullmatch(r"(/[0-9]*)?", path):
        raise ConfigError(f"{what}, with the number of a database at its end, got {masked_url(url)!r}")


def masked_url(url: str) -> str:
    """Return a URL without what may be a password. Where that is not clear, only its scheme is left."""
    scheme, found, rest = url.partition("://")
    place, _, options = rest.partition("?")
    if not found or "@" in options or "#" in rest or not _PLACE.fullmatch(place.rpartition("@")[2]):
        return f"{scheme.partition(':')[0]}:…" if ":" in url else "…"
    return shown_url(url)


_PLACE = re.compile(r"(\[[0-9a-fA-F:.]*\]|[^:]*)(:[0-9]*)?(/[^:]*)?")
"""A host, a port and a path. A password that was put in a wrong place is not one of them."""


def _name(key: str, kind: str) -> bytes:
    """Return the name of a key in the server. The tag in braces keeps the keys of one script together in a cluster."""
    return _encoded(f"{{fluxibly:{key}}}:{kind}")


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # a user's function may return half of a surrogate pair


def _text(value: float) -> str:
    return repr(float(value))


def _microseconds(seconds: float) -> str:
    return _text(min(seconds, _LONGEST) * 1e6)
