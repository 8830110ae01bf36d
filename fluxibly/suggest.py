"""The nearest known name, for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing if no known name is near."""
    import difflib  # late, for the sake of `import fluxibly`

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def naming_the_nearest(cls: type[T]) -> type[T]:
    """A class whose TypeError for an unknown keyword names the nearest that it knows (Python's own does from 3.13)."""
    init: Any = cls.__init__
    names = [name for name in init.__annotations__ if name != "return"]

    @wraps(init)
    def checked(self: object, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in names:
                raise TypeError(f"{cls.__name__} has no {name!r}{did_you_mean(name, names)}")
        init(self, *args, **settings)

    type.__setattr__(cls, "__init__", checked)
    return cls
