"""The errors that the data classes raise. They stand apart from `errors`, which imports the data classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class FluxiblyError(Exception):
    """The base class of fluxibly's errors."""

    __module__ = "fluxibly.errors"  # where users find it


class BadPrompt(FluxiblyError, ValueError):
    """The prompt is empty: an empty str, no messages, or a last message of the user without content."""

    __module__ = "fluxibly.errors"


class ConfigError(FluxiblyError, ValueError):
    """A setting is wrong. `problems` lists every wrong setting, each with its path."""

    __module__ = "fluxibly.errors"

    def __init__(self, message: str, *, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)

    @classmethod
    def of(cls, problems: Sequence[str]) -> Self:
        """Return the error that lists all `problems`, each with its path."""
        message = "several settings are wrong:\n" + "\n".join(f"- {problem}" for problem in problems)
        return cls(problems[0] if len(problems) == 1 else message, problems=tuple(problems))
