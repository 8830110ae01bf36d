"""The requests of rows, and the keys by which equal ones are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxibly.batch._rows import Row
from fluxibly.errors import BadPrompt
from fluxibly.llm import LLM, AsyncLLM
from fluxibly.messages import Message
from fluxibly.middleware import Defaults
from fluxibly.middleware._request_key import KeysOfRows
from fluxibly.types import Request, replaced


class Requests:
    """Makes requests of rows, and their keys.

    Args:
        system: a system message for each prompt that has none.
    """

    def __init__(self, llm: LLM | AsyncLLM, system: str | None = None) -> None:
        self._llm = llm
        self._system = None if system is None else Message.system(system)
        self._info = llm.pipeline.info
        self._defaults = [layer for layer in llm.pipeline.middleware if isinstance(layer, Defaults)]
        usual = self._request("-", {})
        self._usual_keys = self._keys_of(usual)
        self.settings = self._usual_keys.key(usual.messages)
        """A hash of what is sent beside the rows."""

    def _request(self, prompt: Any, settings: Mapping[str, Any]) -> Request:
        request = self._llm.request(prompt, settings)
        system = self._system
        if system is None or any(message.role == "system" for message in request.messages):
            return request
        return replaced(request, {"messages": (system, *request.messages)})

    def completed(self, request: Request) -> Request:
        """Return a request with what the stack's `Defaults` add to it."""
        for layer in self._defaults:
            request = layer.completed(request)
        return request

    def _keys_of(self, request: Request) -> KeysOfRows:
        return KeysOfRows(self.completed(request), self._info)

    def of(self, row: Row) -> tuple[Request, str]:
        """Return the request of a row, and its key.

        Raises:
            Exception: the row cannot be asked.
        """
        if row.problem is not None:
            raise BadPrompt(row.problem)
        request = self._request(row.prompt, row.settings)
        keys = self._keys_of(request) if row.settings else self._usual_keys
        return request, keys.key(request.messages)

    def key_of(self, row: Row) -> str:
        """Return the key of a row; "" if it cannot be asked."""
        try:
            return self.of(row)[1]
        except Exception:  # noqa: BLE001  # as when it is asked
            return ""
