"""The errors that the data classes raise. They stand apart from `errors`, which imports the data classes."""

from __future__ import annotations


class FluxiblyError(Exception):
    """The base class of fluxibly's errors."""

    __module__ = "fluxibly.errors"  # where users find it


class BadPrompt(FluxiblyError, ValueError):
    """The prompt is empty: an empty str, no messages, or a last message of the user without content."""

    __module__ = "fluxibly.errors"
