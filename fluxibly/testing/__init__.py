"""Tools to test middleware, providers and codecs: scripts, a virtual clock, flows stepped by hand, and checks of the laws.

They need no test framework. Imports: the rooms up to `pipeline`, and `dialects`; no room of the library imports this one.
The module `pytest_plugin` stands apart: it needs pytest, and imports `middleware`.
"""

from typing import TYPE_CHECKING, Any

from fluxibly.testing.by_hand import ByHand as ByHand
from fluxibly.testing.checks import check_middleware as check_middleware
from fluxibly.testing.provider_check import check_provider as check_provider
from fluxibly.testing.scripted import (
    Answer as Answer,
    AsyncScriptedProvider as AsyncScriptedProvider,
    Cut as Cut,
    Delay as Delay,
    ScriptedProvider as ScriptedProvider,
    VirtualClock as VirtualClock,
)

if TYPE_CHECKING:
    from fluxibly.testing.codec_check import check_codec as check_codec

__all__ = [
    "Answer",
    "AsyncScriptedProvider",
    "ByHand",
    "Cut",
    "Delay",
    "ScriptedProvider",
    "VirtualClock",
    "check_codec",
    "check_middleware",
    "check_provider",
]


def __getattr__(name: str) -> Any:
    if name == "check_codec":  # late, because few tests need the modules of codecs
        from fluxibly.testing.codec_check import check_codec

        return check_codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
