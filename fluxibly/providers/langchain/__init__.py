"""The framework `langchain`: any chat model of LangChain as a provider, and `as_chat_model` for the other direction.

`_provider.py` and `_parameters.py` make calls. `_models.py` creates chat models and closes them. `_messages.py` and
`_stream.py` translate for the calls that fluxibly makes to LangChain, `_chat_model.py` for the calls that LangChain
makes to fluxibly; both read and write the blocks of a content with `_blocks.py`. Imports: `_libraries`, `dialects`, `http`, `config`, data and its helpers.
"""

from fluxibly.providers.langchain._provider import AsyncLangChainProvider, LangChainProvider, as_chat_model

__all__ = ["AsyncLangChainProvider", "LangChainProvider", "as_chat_model"]
