"""The check of JSON values against a JSON Schema, by jsonschema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError


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


def problems_of(value: object, schema: Mapping[str, Any]) -> list[str]:
    """Return what does not match a JSON Schema, each with its path, for the model to correct.

    Raises:
        ConfigError: the schema has a reference that leads outside of it.
    """
    from referencing.exceptions import Unresolvable

    try:
        found = _validator(json.dumps(dict(schema))).iter_errors(value)
        return [f"{problem.json_path}: {problem.message}" for problem in found]
    except Unresolvable as error:
        raise ConfigError(f"the JSON Schema refers to {error.ref!r}, which is not in it") from None


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
