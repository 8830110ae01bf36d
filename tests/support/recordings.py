"""Recorded exchanges with model services: the project's own, and others in a folder beside the project."""

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
OWN = Path(__file__).parents[1] / "data" / "recorded"
"""Answers of real servers that can run anywhere. `record.py` beside the folder records them again."""


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
    provider: str


@cache
def load(name: str) -> Recording:
    """Return the recording whose file name begins with `name` ("16-"), or skip the test if there is no such file."""
    found = sorted(FOLDER.glob(f"{name}*.json"))
    if not found:
        pytest.skip(f"no recorded exchange {name} in the folder that FLUXIBLY_RECORDED names")
    return read(found[0])


def read(file: Path) -> Recording:
    """Return the recording in a file."""
    data = json.loads(file.read_text())
    if data.get("response_wire_b64"):
        body = gzip.decompress(base64.b64decode(data["response_wire_b64"]))
    else:
        body = (data["response_body"] or "").encode()
        if data.get("response_body_encoding") == "base64":
            body = base64.b64decode(body)
    return Recording(
        name=file.stem,
        dialect=data["dialect"],
        status=data["status"],
        streaming=data["streaming"],
        headers={name.lower(): value for name, value in data["response_headers"].items() if isinstance(value, str)},
        body=body,
        request=json.loads(data["request_body"]) if data["request_body"] else None,
        provider=data["provider"],
    )
