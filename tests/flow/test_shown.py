"""The `repr` of middleware without one of their own."""

from __future__ import annotations

from enum import Enum, StrEnum
from functools import partial
from typing import Any, NamedTuple

import pytest

from fluxibly import LLM, Pipeline
from fluxibly.flow.shown import repr_of_layer
from fluxibly.middleware import Retry
from fluxibly.testing import ScriptedProvider


class Tone(Enum):
    WARM = "warm"


class Keys(StrEnum):
    OURS = "s3cret-ours"


class Login(NamedTuple):
    user: str
    password: str


def plain(request: Any, call_next: Any) -> Any:
    return (yield from call_next(request))


def toned(request: Any, call_next: Any, *, tone: str, api_key: str = "") -> Any:
    return (yield from call_next(request))


def maker(tone: str, limit: int, seen: list[str]) -> Any:
    def polite(request: Any, call_next: Any) -> Any:
        seen.append(tone * limit)
        return (yield from call_next(request))

    return polite


class Polite:
    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)

    def __call__(self, request: Any, call_next: Any) -> Any:
        return (yield from call_next(request))


class Slotted(Polite):
    __slots__ = ("empty", "tone")

    def __init__(self) -> None:
        self.tone = "warm"


class Shows(Polite):
    def __repr__(self) -> str:
        return "my own"


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (plain, "plain"),
        (maker("warm", 2, ["said by the user"]), "polite(limit=2, tone='warm')"),
        (partial(toned, tone="warm", api_key="sk-1234"), "toned(tone='warm', api_key='***')"),
        (partial(plain, "what is this?"), "plain(…)"),
        (Polite(), "Polite()"),
        (Polite(tone="warm", limit=3, ratio=0.5, on=True, none=None), "Polite(tone='warm', limit=3, ratio=0.5, on=True, none=None)"),
        (Polite(kinds=(Tone.WARM, ValueError), only=frozenset({1})), "Polite(kinds=(Tone.WARM, ValueError), only=frozenset({1}))"),
        (Polite(one=(1,), many=tuple(range(9)), check=plain), "Polite(one=(1,), many=(0, 1, 2, 3, 4, 5, …), check=plain)"),
        (Polite(token="t-1234", headers=("a",), url="https://me:pw@host/?key=k"), "Polite(token='***', headers=('***',), url='https://***@host/?key=***')"),  # noqa: S106  # what must not be shown
        (Polite(_private=1, history=["said by the user"], cache={"a": 1}, other=object()), "Polite()"),
        (Slotted(), "Slotted(tone='warm')"),
        (Polite(tone="warm").__call__, "Polite.__call__(tone='warm')"),
        (Shows(tone="warm"), "my own"),
        (Retry(max_retries=5), repr(Retry(max_retries=5))),
    ],
)  # fmt: skip
def test_a_layer(layer: Any, shown: str) -> None:
    """The settings are shown: plain values, with secrets masked. What may hold content is not."""
    assert repr_of_layer(layer) == shown


@pytest.mark.parametrize(
    "value",
    [
        Keys.OURS,
        Login("me", "s3cret"),
        (Login("me", "s3cret"),),
        "Bearer s3cret-s3cret",
        "sk-proj-s3crets3crets3cret",
        "host=here password=s3cret",
        "postgres://me:s3cret@host/db",
        ("https://host/?api_key=s3cret",),
    ],
)
def test_a_secret_of_another_name(value: Any) -> None:
    """What is a key by its looks is masked under any name, and the value of an enum and the fields of a record are not shown."""
    assert "s3cret" not in repr_of_layer(Polite(setting=value))
    assert "s3cret" not in repr_of_layer(partial(plain, setting=value))


@pytest.mark.parametrize("name", ["pwd", "passwd", "passphrase", "bearer", "x_signature"])
def test_a_secret_name(name: str) -> None:
    """The usual names of secrets are known."""
    assert repr_of_layer(Polite(**{name: "s3cret"})) == f"Polite({name}='***')"


def nested(value: Any, times: int, copies: int) -> Any:
    for _ in range(times):
        value = (value,) * copies
    return value


LONG = {
    "text": "x" * 10_000,
    "number": 10**6000,
    "texts": nested("x" * 99, 9, 9),
    "deep": nested(1, 10_000, 1),
    "many in many": nested(1, 60, 2),
    "many": tuple(range(10**5)),
}


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_a_long_setting_is_cut(value: Any) -> None:
    """A long text is shown in part, as are a huge number, and values that are many or deep."""
    assert len(repr_of_layer(Polite(prompt=value))) < 3000


def test_a_repr_that_raises() -> None:
    """A middleware whose `repr` raises does not spoil that of the model."""

    class Broken(Polite):
        def __repr__(self) -> str:
            raise ValueError("s3cret")

    llm = LLM("echo:m", middleware=[Broken(), plain])
    assert repr(llm) == "LLM('echo', 'm', middleware=[<Broken: its repr raises ValueError>, plain])"


def test_a_closure_that_is_not_complete() -> None:
    """A variable of a closure that has no value yet is left out."""

    def make() -> Any:
        def layer(request: Any, call_next: Any) -> Any:
            return (yield from later(request, call_next))

        if layer:
            return layer
        later = plain
        return later

    assert repr_of_layer(make()) == "layer"


def test_where_it_is_shown() -> None:
    """Models, pipelines and explanations show it."""
    layer = Polite(tone="warm")
    llm = LLM("echo:m", middleware=[layer, maker("cold", 1, [])])
    assert repr(llm) == "LLM('echo', 'm', middleware=[Polite(tone='warm'), polite(limit=1, tone='cold')])"
    assert "[Polite(tone='warm')]" in repr(Pipeline(ScriptedProvider(), [layer]))
    text = str(llm.explain())
    assert "Polite" in text
    assert "tone='warm'" in text
    assert "limit=1, tone='cold'" in text
