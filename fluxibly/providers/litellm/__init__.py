"""The framework `litellm`: any model that LiteLLM knows, by LiteLLM's name for it.

`_provider.py` makes calls, `_answers.py` reads what comes back, `_services.py` says whose model it is and who answered,
`_clients.py` closes connections. Imports: `_libraries`, `dialects`, `http`, `config`, data.
"""

from fluxibly.providers.litellm._provider import AsyncLiteLLMProvider, LiteLLMProvider

__all__ = ["AsyncLiteLLMProvider", "LiteLLMProvider"]
