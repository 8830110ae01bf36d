"""The framework `langchain`: any chat model that LangChain knows; and `as_chat_model`, fluxibly inside of LangChain.

`_provider.py` and `_parameters.py` make calls, `_models.py` makes chat models and closes them, `_messages.py` and
`_chat_model.py` translate, the one for calls that we make of LangChain, the other for those that it makes of us.
Imports: `_libraries`, `dialects`, `http`, `config`, data.
"""

from fluxibly.providers.langchain._provider import AsyncLangChainProvider, LangChainProvider, as_chat_model

__all__ = ["AsyncLangChainProvider", "LangChainProvider", "as_chat_model"]
