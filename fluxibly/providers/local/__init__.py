"""The framework `local`: a small model in this process, run by llama.cpp through xllamacpp.

`_provider.py` answers requests, `_engine.py` holds loaded models and their generations, `_model.py` finds and fetches
model files. Imports: `dialects` (the prompt is OpenAI's dialect), `config`, data. Imported by: `cli`, and `registry` by name.
"""

from fluxibly.providers.local._model import (
    DEFAULT_MODEL,
    cache_folder,
    cached_path,
    model_path,
    named_model,
    packaged_models,
)
from fluxibly.providers.local._provider import AsyncLocalProvider, LocalProvider

__all__ = [
    "DEFAULT_MODEL",
    "AsyncLocalProvider",
    "LocalProvider",
    "cache_folder",
    "cached_path",
    "model_path",
    "named_model",
    "packaged_models",
]
