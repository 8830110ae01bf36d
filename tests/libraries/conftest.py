"""Fixtures of the tests of LangChain and LiteLLM."""

from __future__ import annotations

import pytest
from support.libraries import MODES, STREAM_MODES


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=STREAM_MODES)
def stream_mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)
