"""A pytest plugin with the fixture `recording`: a middleware that answers a test's calls from a file beside the test.

To use it, write `pytest_plugins = ["fluxibly.testing.pytest_plugin"]` in the `conftest.py` at the root of the tests::

    def test_greeting(recording):
        with LLM(LLMConfig(framework="openai", model="gpt-4o-mini"), [recording]) as llm:
            assert "Hello" in llm.complete("Say hello").text

`pytest --llm-record=missing` sends the calls that are not recorded, and records them; `--llm-record=all` records all anew.
Without the option nothing is sent, and a call that is not recorded fails with `NotRecorded`. The file is
`recordings/MODULE/TEST.jsonl`, beside the test's module.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import attrs
import pytest

from fluxibly.middleware import Record, Replay

_LONGEST = 100
"""The most characters of a file's name, without what tells apart those that are cut."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--llm-record`."""
    parser.getgroup("fluxibly").addoption(
        "--llm-record",
        choices=("none", "missing", "all"),
        default="none",
        help="which calls of tests with the fixture `recording` to send and record: none (the default), those that are "
        "missing in the recordings, or all",
    )


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Record | Replay:
    """A middleware that answers the test's calls from its recording, or records them; see `--llm-record`."""
    file = recording_of(request.node)
    which = request.config.getoption("--llm-record")
    if which == "none":
        return _Recorded(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if which == "missing":
        return Replay(file, missing="ask")
    file.unlink(missing_ok=True)
    return Record(file)


@attrs.frozen(eq=False)
class _Recorded(Replay):
    """A `Replay` whose messages say how a test records what is missing."""

    advice: ClassVar[str] = "run pytest --llm-record=missing to record it"


def recording_of(test: pytest.Item) -> Path:
    """Return the file of a test's recording: `recordings/MODULE/TEST.jsonl` beside its module.

    The name is safe on every file system.
    """
    whole = test.nodeid.partition("::")[2]
    name, bracket, parameters = whole.partition("[")
    name, parameters = name.replace("::", "."), parameters.removesuffix("]")
    plain = f"{name}-{parameters}" if bracket else name
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:_LONGEST].rstrip(".")
    # Names may differ only in what is replaced or cut here, and parameters also in upper and lower case.
    if safe != plain or parameters != parameters.lower():
        safe += f"-{sha256(whole.encode()).hexdigest()[:8]}"
    return test.path.parent / "recordings" / test.path.stem / f"{safe}.jsonl"
