"""Stores: where middleware keep what calls share, such as the places of a limit.

`MemoryStore` shares it within one process. A store of your own, on a server for example, has the methods of `Store`.

Imports: data and its helpers. Imported by: `middleware`.
"""

from collections.abc import Collection
from typing import Any

from fluxibly._checks import kind_of
from fluxibly.errors import ConfigError
from fluxibly.stores.memory import MemoryStore
from fluxibly.stores.protocol import Entry, Limit, Store, Turn

__all__ = ["Entry", "Limit", "MemoryStore", "Store", "Turn", "to_store"]


def to_store(value: Any, needs: Collection[str] | None = None) -> Any:
    """Return the store that a URL stands for: None and "memory" are a new `MemoryStore`. It is a converter of attrs.

    Args:
        needs: the methods that the store must have; None: all.

    Raises:
        ConfigError: it is neither a URL of a known kind nor a store.
    """
    if value is None or value == "memory":
        return MemoryStore()
    methods = (
        _METHODS if needs is None else [name for name in _METHODS if name.removeprefix("a") in needs or name in needs]
    )
    expected = "store: expected 'memory' or an object with the methods of fluxibly.stores.Store"
    if isinstance(value, str):
        scheme, colon, _ = value.partition(":")
        raise ConfigError(f"{expected}, got {scheme + ':…' if colon else value!r}")  # a URL may have a password
    if isinstance(value, type):
        raise ConfigError(f"{expected}, got the class {value.__name__}; write {value.__name__}()")
    missing = [name for name in methods if not callable(getattr(value, name, None))]
    if missing:
        raise ConfigError(f"{expected}, got {kind_of(value)} without {', '.join(missing)}")
    return value


_METHODS = tuple(name for name in vars(Store) if not name.startswith("_") and name != "local")
