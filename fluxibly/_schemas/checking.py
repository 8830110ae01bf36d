"""The conversion of JSON text into the value that a JSON Schema describes, or into an attrs class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, lru_cache, partial
from typing import Any

import attrs

from fluxibly._checks import is_mapping
from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError


def check_schema(schema: object) -> None:
    """Check that `parse` can use a schema.

    Raises:
        ConfigError: the schema is neither a JSON Schema nor an attrs class, or jsonschema is not installed.
    """
    if isinstance(schema, type) and attrs.has(schema):
        return
    if not is_mapping(schema):
        raise ConfigError(f"Validation(schema=…): expected a JSON Schema (a mapping) or an attrs class, got {schema!r}")
    try:
        text = json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Validation(schema=…) is not a JSON Schema: {error}") from None
    _validator(text)


def parse(text: str, schema: Mapping[str, Any] | type[Any]) -> Any:
    """Return the JSON value in `text`, checked against a JSON Schema or converted into an attrs class.

    Raises:
        ValueError: the text is not JSON or does not match the schema. The message says what the model has to correct.
        ConfigError: the schema has a reference that leads outside it.
    """
    try:
        value: Any = json.loads(_without_fence(text), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not valid JSON: {error}") from None
    if isinstance(schema, type):
        return _structured(value, schema)
    problems = _mismatches(value, _validator(json.dumps(dict(schema))))
    if problems:
        raise ValueError(f"the answer does not match the JSON Schema: {'; '.join(problems)}")
    return value


def _mismatches(value: object, validator: Any) -> list[str]:
    from referencing.exceptions import Unresolvable

    try:
        return [f"{problem.json_path}: {problem.message}" for problem in validator.iter_errors(value)]
    except Unresolvable as error:
        raise ConfigError(f"Validation(schema=…) refers to {error.ref!r}, which is not in the schema") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _structured(value: object, schema: type[Any]) -> Any:
    """Return plain data as an instance of the attrs class `schema`."""
    import cattrs

    try:
        return _converter().structure(value, schema)
    except Exception as error:  # noqa: BLE001  # cattrs raises groups of any errors that the class raises
        problems = cattrs.transform_error(error, path=schema.__name__, format_exception=_problem)
        raise ValueError(f"the answer does not fit {schema.__name__}: {'; '.join(problems)}") from None


def _problem(error: BaseException, kind: type | None) -> str:
    from cattrs.v import format_exception

    formatted = format_exception(error, kind)
    # cattrs reports only that a class's own validator failed, without the validator's message.
    return f"{formatted}: {error}" if kind is None and isinstance(error, ValueError) else formatted


@cache
def _converter() -> Any:
    """Return a strict cattrs converter for JSON. The default is lenient: bool("no") is True, and int(2.7) is 2."""
    from cattrs.preconf.json import make_converter

    converter = make_converter()
    for kind, accepted in ((bool, bool), (int, int), (float, (int, float)), (str, str)):
        converter.register_structure_hook(kind, partial(_strictly, kind, accepted))
    return converter


def _strictly(kind: type, accepted: type | tuple[type, ...], value: object, _: object) -> object:
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
        from jsonschema.validators import validator_for
        from referencing.jsonschema import EMPTY_REGISTRY
    except ImportError:
        raise ConfigError(f"Validation with a JSON Schema needs jsonschema: {pip_install('schema')}") from None
    parsed = json.loads(schema)
    kind: Any = validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"Validation(schema=…) is not a JSON Schema: {error.message}") from None
    return kind(parsed, registry=EMPTY_REGISTRY)  # an empty registry, so that no $ref is ever fetched from the network


def _without_fence(text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text
