"""Fixtures for the tests of the drivers."""

from __future__ import annotations

import pytest
from support.streams import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param
