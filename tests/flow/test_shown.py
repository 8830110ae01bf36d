"""The `repr` of middleware without one of their own."""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import Any

import pytest

from fluxibly import LLM, Pipeline
from fluxibly.flow.shown import repr_of_layer
from fluxibly.middleware import Retry
from fluxibly.testing import ScriptedProvider


class Tone(Enum):
    WARM = "warm"


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


def test_a_long_setting_is_cut() -> None:
    """A long text is shown in part."""
    assert len(repr_of_layer(Polite(prompt="x" * 10_000))) < 100


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
