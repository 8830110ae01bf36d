"""The turns of `fluxibly chat`, kept in a SQLite file of the user's, and what `fluxibly logs` shows of them.

`log.py` is what the chat calls, `store.py` the file, `masking.py` what is not written to it, and `report.py` lays turns out.
"""

from fluxibly.cli.turns.log import TurnLog, last_conversation, new_conversation
from fluxibly.cli.turns.store import Conversation

__all__ = ["Conversation", "TurnLog", "last_conversation", "new_conversation"]
