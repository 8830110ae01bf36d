"""The references within JSON Schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluxibly._checks import is_list, is_mapping


def with_references(schema: Any, change: Callable[[str], str]) -> Any:
    """Return a schema whose references within itself (`$ref`s that begin with "#") are changed by a function."""
    if is_list(schema):
        return [with_references(each, change) for each in schema]
    if not is_mapping(schema):
        return schema
    changed: dict[str, Any] = {word: with_references(value, change) for word, value in schema.items()}
    ref: object = changed.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        changed["$ref"] = change(ref)
    return changed
