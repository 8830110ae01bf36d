"""For tests of middleware and providers: scripted providers, a virtual clock, and checks of the laws.

Nothing here needs a test framework.
"""

from fluxibly.testing.checks import check_middleware as check_middleware
from fluxibly.testing.clock import VirtualClock as VirtualClock
from fluxibly.testing.scripted import (
    Answer as Answer,
)
from fluxibly.testing.scripted import (
    AsyncScriptedProvider as AsyncScriptedProvider,
)
from fluxibly.testing.scripted import (
    Cut as Cut,
)
from fluxibly.testing.scripted import (
    Delay as Delay,
)
from fluxibly.testing.scripted import (
    ScriptedProvider as ScriptedProvider,
)

__all__ = ["Answer", "AsyncScriptedProvider", "Cut", "Delay", "ScriptedProvider", "VirtualClock", "check_middleware"]
