"""Stores: where middleware keep what calls share, such as the places of a limit.

`MemoryStore` shares it within one process. A store of your own, on a server for example, has the methods of `Store`.

Imports: data and its helpers. Imported by: `middleware`.
"""

from fluxibly.stores.memory import MemoryStore
from fluxibly.stores.protocol import Entry, Limit, Store, Turn, to_store

__all__ = ["Entry", "Limit", "MemoryStore", "Store", "Turn", "to_store"]
