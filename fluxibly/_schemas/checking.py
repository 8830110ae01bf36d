"""The check of JSON values against a JSON Schema, by jsonschema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Final

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError

MOST_PROBLEMS: Final = 20
"""The most problems that a message lists."""
LONGEST_PROBLEM: Final = 300
"""The longest text of one problem, in characters."""


def cut(text: str) -> str:
    """Return a text that may be long (it may quote the whole value) without its middle."""
    half = LONGEST_PROBLEM // 2
    return text if len(text) <= LONGEST_PROBLEM else f"{text[:half]} … {text[-half:]}"


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check that values can be checked against a JSON Schema.

    Raises:
        ConfigError: it is not a JSON Schema, or jsonschema is not installed.
    """
    try:
        text = json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"it is not a JSON Schema: {error}") from None
    _validator(text)


def checked(schema: Mapping[str, Any], value: Any, path: str = "$") -> Any:
    """Return a JSON value that matches a JSON Schema.

    Raises:
        ValueError: it does not match. The message lists what does not, each with its path, for the model to correct.
        ConfigError: the schema has a reference that leads outside of it.
    """
    from referencing.exceptions import Unresolvable

    try:
        problems: list[Any] = list(islice(_validator(json.dumps(dict(schema))).iter_errors(value), MOST_PROBLEMS + 1))
    except Unresolvable as error:
        raise ConfigError(f"the JSON Schema refers to {error.ref!r}, which is not in it") from None
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply") from None
    if problems:
        told = [f"{path}{cut(problem.json_path[1:])}: {cut(problem.message)}" for problem in problems[:MOST_PROBLEMS]]
        raise ValueError("; ".join(told if len(problems) <= MOST_PROBLEMS else [*told, "and more"]))
    return value


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
        from jsonschema.validators import validator_for
        from referencing.jsonschema import EMPTY_REGISTRY
    except ImportError:
        raise ConfigError(f"a JSON Schema needs jsonschema: {pip_install('schema')}") from None
    parsed = json.loads(schema)
    kind: Any = validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"it is not a JSON Schema: {error.message}") from None
    return kind(parsed, registry=EMPTY_REGISTRY)  # an empty registry, so that no $ref is ever fetched from the network
