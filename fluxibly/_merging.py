"""How `additional_params` and `extra` are merged into the body of a request.

Tables are merged key by key, and null removes a key (JSON Merge Patch, RFC 7396). A list replaces a list, except that
`tools` are added to the other tools: they are the only way to ask for a service's own tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxibly._checks import is_list, is_mapping


def merge_into(body: dict[str, Any], patch: Mapping[str, Any]) -> None:
    """Merge `patch` into `body`. Tables inside of `body` are replaced by merged copies, not changed."""
    for name, value in patch.items():
        if value is None:
            body.pop(name, None)
        elif is_mapping(value):
            table = _copy(body.get(name))
            merge_into(table, value)
            body[name] = table
        else:
            body[name] = _added(body.get(name), value) if name == "tools" else value


def composed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the patch that does what `first` and then `second` would do."""
    both = dict(first)
    for name, value in second.items():
        if is_mapping(value) and is_mapping(both.get(name)):
            both[name] = composed(both[name], value)
        else:
            both[name] = _added(both.get(name), value) if name == "tools" else value
    return both


def _added(tools: object, more: object) -> object:
    return [*tools, *more] if is_list(tools) and is_list(more) else more


def _copy(table: object) -> dict[str, Any]:
    return dict(table) if is_mapping(table) else {}
