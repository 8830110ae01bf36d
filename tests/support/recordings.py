"""Recorded exchanges with model services."""

from __future__ import annotations

import base64
import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest

FOLDER = Path(os.environ.get("FLUXIBLY_RECORDED") or Path(__file__).parents[3] / "shared" / "recorded")


@attrs.frozen
class Recording:
    """A recorded exchange. `body` is decompressed; `headers` have lower-case names."""

    name: str
    dialect: str
    status: int
    streaming: bool
    headers: dict[str, str]
    body: bytes
    request: Any


@cache
def load(name: str) -> Recording:
    """Return the recording whose file name begins with `name` ("16-"), or skip the test if there is no such file."""
    found = sorted(FOLDER.glob(f"{name}*.json"))
    if not found:
        pytest.skip(f"no recorded exchange {name} in the folder that FLUXIBLY_RECORDED names")
    data = json.loads(found[0].read_text())
    if data.get("response_wire_b64"):
        body = gzip.decompress(base64.b64decode(data["response_wire_b64"]))
    else:
        body = (data["response_body"] or "").encode()
    headers = {name.lower(): value for name, value in data["response_headers"].items() if isinstance(value, str)}
    request = json.loads(data["request_body"]) if data["request_body"] else None
    return Recording(found[0].stem, data["dialect"], data["status"], data["streaming"], headers, body, request)
