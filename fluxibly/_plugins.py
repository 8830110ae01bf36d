"""The entry points by which other packages bring frameworks, middleware and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from fluxibly._checks import kind_of
from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind: TypeAlias = Literal["frameworks", "middleware", "functions"]
WHAT = {"fluxibly.frameworks": "framework", "fluxibly.middleware": "middleware", "fluxibly.functions": "function"}
"""What the entry points of a group are."""


@cache
def entry_points(kind: Kind) -> Mapping[str, EntryPoint]:
    """Return the entry points of a kind by name. Of several packages with one name, the first by its name wins."""
    return {point.name: point for point in reversed(installed_points(kind))}


def installed_points(kind: Kind) -> list[EntryPoint]:
    from importlib import metadata

    group = f"fluxibly.{kind}"
    try:
        found = list(metadata.entry_points(group=group))
    except Exception:  # noqa: BLE001  # one package's unreadable metadata must not hide the others
        found = [point for point in _readable_points() if point.group == group]
    return sorted(found, key=lambda point: (point.name, package_of(point)))


def _readable_points() -> Iterator[EntryPoint]:
    """Yield the entry points of each package whose metadata can be read."""
    from importlib.metadata import distributions

    seen: set[str] = set()
    for distribution in distributions():
        try:
            name, points = distribution.name.lower(), list(distribution.entry_points)
        except Exception:  # noqa: BLE001, S112  # whatever is wrong with that package
            continue
        if name not in seen:  # a package that is on the path twice is imported from its first place
            seen.add(name)
            yield from points


def package_of(point: EntryPoint) -> str:
    """Return the name and version of the package that has an entry point."""
    try:
        return f"{point.dist.name} {point.dist.version}"  # type: ignore[union-attr]  # without a package: caught below
    except Exception:  # noqa: BLE001  # an entry point without a package, or a package without readable metadata
        return "an unknown package"


def load(point: EntryPoint) -> Callable[..., Any]:
    """Import what an entry point names.

    Raises:
        ConfigError: that fails, or what it names cannot be called.
    """
    what = f"{WHAT[point.group]} {point.name!r}: the entry point {point.value!r} of {package_of(point)}"
    try:
        loaded = point.load()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a module may end with SystemExit, or with the panic of a library in Rust
        raise ConfigError(f"{what} cannot be imported: {one_line(error)}; repair or uninstall that package") from error
    if not callable(loaded):
        raise ConfigError(f"{what}: expected a class or another callable, got {kind_of(loaded)}")
    return cast("Callable[..., Any]", loaded)


def check_registration(name: object, value: object, what: str) -> None:
    """Check what a `register_…` function gets. `what` is the kind of thing that is registered.

    Raises:
        ValueError: the name is empty.
        TypeError: `value` cannot be called.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{what} name: expected a non-empty str, got {name!r}")
    if not callable(value):
        raise TypeError(f"the {what} {name!r}: expected a class or another callable, got {kind_of(value)}")


def is_redefinition(old: object, new: object) -> bool:
    """Whether two classes or functions are the same, or the second is a new definition of the first, as notebooks make."""
    if old is new:
        return True
    names = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (old, new)]
    return names[0] == names[1] and None not in names[0]


def one_line(error: BaseException) -> str:
    """Return an exception's type and its message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
