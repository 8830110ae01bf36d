"""The framework `litellm`: any model that LiteLLM supports, under LiteLLM's name.

`_provider.py` makes calls, `_answers.py` reads the answers, `_services.py` names the service that is asked and the
service that answered, `_clients.py` closes connections. Imports: `_libraries`, `dialects`, `http`, `config`, data.
"""

from fluxibly.providers.litellm._provider import AsyncLiteLLMProvider, LiteLLMProvider

__all__ = ["AsyncLiteLLMProvider", "LiteLLMProvider"]
