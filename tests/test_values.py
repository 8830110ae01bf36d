"""`repr`, equality and hash of the data classes: what attrs itself would generate."""

from __future__ import annotations

import attrs
import pytest

from fluxibly._values import Shown, Value


@attrs.frozen(repr=False, eq=False)
class Mine(Value):
    a: int
    b: str = attrs.field(default="x", repr=lambda value: f"<{value}>")
    hidden: int = attrs.field(default=0, repr=False)
    ignored: int = attrs.field(default=0, eq=False)


@attrs.frozen
class Theirs:
    a: int
    b: str = attrs.field(default="x", repr=lambda value: f"<{value}>")
    hidden: int = attrs.field(default=0, repr=False)
    ignored: int = attrs.field(default=0, eq=False)


VALUES = [(1,), (2,), (1, "y"), (1, "x", 3), (1, "x", 0, 4)]


@pytest.mark.parametrize("values", VALUES)
def test_repr_is_that_of_attrs(values):
    """Fields without `repr` are left out, and a field's own function is used."""
    assert repr(Mine(*values)) == repr(Theirs(*values)).replace("Theirs", "Mine")


@pytest.mark.parametrize("one", VALUES)
@pytest.mark.parametrize("other", VALUES)
def test_equality_is_that_of_attrs(one, other):
    """Fields without `eq` do not count; equal values have equal hashes."""
    assert (Mine(*one) == Mine(*other)) is (Theirs(*one) == Theirs(*other))
    assert (Mine(*one) != Mine(*other)) is (Theirs(*one) != Theirs(*other))
    if Mine(*one) == Mine(*other):
        assert hash(Mine(*one)) == hash(Mine(*other))


def test_another_class_is_never_equal():
    """Not even a subclass with the same values."""

    @attrs.frozen(repr=False, eq=False)
    class Derived(Mine):
        pass

    assert Mine(1) != Derived(1)
    assert Mine(1) != (1, "x", 0, 0)
    assert Mine(1) != 1


def test_a_shown_class_has_the_identity_of_an_object():
    """`Shown` gives `repr` alone."""

    @attrs.frozen(repr=False, eq=False)
    class Only(Shown):
        a: int

    assert Only(1) != Only(1)
    assert repr(Only(1)).endswith("Only(a=1)")
