"""The states of a stream, shared by the drivers and the HTTP client, which must not import each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

State: TypeAlias = Literal["new", "idle", "reading", "closing", "ended"]
"""The states of a stream.

`new`: nothing was read. `idle`: between two reads. `reading`: a read is under way. `closing`: the consumer has given the
stream up, and a read is still under way. `ended`: everything is closed, or is being closed by the call that ended the stream.
"""

TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "new": frozenset({"reading", "closing", "ended"}),
    "idle": frozenset({"reading", "closing", "ended"}),
    "reading": frozenset({"idle", "closing", "ended"}),
    "closing": frozenset({"ended"}),
    "ended": frozenset(),
}
"""The states that may follow each state."""
