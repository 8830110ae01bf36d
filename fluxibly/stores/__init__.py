"""Stores: where middleware keep what calls share, such as the places of a limit.

`MemoryStore` shares state within one process, `SQLiteStore` between the processes of one machine, and `RedisStore` between
machines. A store of your own has the methods of `Store`.

Imports: data and its helpers. Imported by: `middleware`.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from fluxibly._checks import kind_of
from fluxibly.errors import ConfigError
from fluxibly.stores.memory import MemoryStore
from fluxibly.stores.protocol import Entry, Limit, Store, Turn

if TYPE_CHECKING:
    from fluxibly.stores.redis import RedisStore
    from fluxibly.stores.sqlite import SQLiteStore

__all__ = ["Entry", "Limit", "MemoryStore", "RedisStore", "SQLiteStore", "Store", "Turn", "to_store"]


def __getattr__(name: str) -> Any:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # late, because few programs need sqlite3 or a server

    return getattr(import_module(module), name)


def to_store(value: Any, needs: Collection[str] | None = None, *, max_bytes: int | None = None) -> Any:
    """Return the store that a URL stands for: None and "memory" are a new `MemoryStore`. It is a converter of attrs.

    Args:
        needs: the methods that the store must have; None: all.
        max_bytes: the most bytes that a store in a file may keep (`SQLiteStore`); None: its own default.

    Raises:
        ConfigError: it is neither a URL of a known kind nor a store, or a server is given `max_bytes`.
    """
    if value is None or value == "memory":
        return MemoryStore()
    methods = (
        _METHODS if needs is None else [name for name in _METHODS if name.removeprefix("a") in needs or name in needs]
    )
    expected = (
        "store: expected 'memory', 'sqlite:PATH', 'redis://HOST' or an object with the methods of fluxibly.stores.Store"
    )
    if isinstance(value, str):
        scheme, colon, path = value.partition(":")
        if scheme == "sqlite":
            return _in_file(path, max_bytes)
        if scheme in _ON_SERVERS and colon:
            return _on_server(value, max_bytes)
        got = scheme + ":…" if colon else value  # a URL may have a password
        raise ConfigError(f"{expected}, got {got!r}")
    if isinstance(value, type):
        raise ConfigError(f"{expected}, got the class {value.__name__}; write {value.__name__}()")
    missing = [name for name in methods if not callable(getattr(value, name, None))]
    if missing:
        raise ConfigError(f"{expected}, got {kind_of(value)} without {', '.join(missing)}")
    return value


def _in_file(path: str, max_bytes: int | None) -> Any:
    if path.startswith("//") or path in ("", ":memory:"):
        advice = "for memory alone, write 'memory'" if path == ":memory:" else "write 'sqlite:answers.db', for example"
        raise ConfigError(f"store: expected the path of a file after 'sqlite:', got {path!r}; {advice}")
    from fluxibly.stores.sqlite import MAX_BYTES, SQLiteStore  # late, as above

    return SQLiteStore(path, max_bytes=MAX_BYTES if max_bytes is None else max_bytes)


def _on_server(url: str, max_bytes: int | None) -> Any:
    if max_bytes is not None:
        raise ConfigError(
            f"max_bytes: expected none with a Redis server, got {max_bytes}; set `maxmemory` in the server's configuration"
        )
    from fluxibly.stores.redis import RedisStore  # late, as above

    # The layers of a stack share the connections, and find out only once that the server is silent.
    store = _made.get(url)
    if store is None:
        store = _made[url] = RedisStore(url)
    return store


_LATE = {"RedisStore": "fluxibly.stores.redis", "SQLiteStore": "fluxibly.stores.sqlite"}
"""The modules of the stores that are loaded when they are needed."""
_ON_SERVERS = ("redis", "rediss", "unix")
_made: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""The stores of servers that are in use, by their URLs."""
_METHODS = tuple(name for name in vars(Store) if not name.startswith("_") and name != "local")
