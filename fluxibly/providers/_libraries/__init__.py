"""The shared parts of the providers that build on another library (LangChain, LiteLLM).

These libraries send the requests themselves. `calls.py` enforces the limits of `Timeouts` from outside and reads the
configuration for a library; `loops.py` closes resources together with their event loop; `services.py` describes the
service that answers; `errors.py` converts a library's exceptions to fluxibly's. Imports: `dialects`, `config`, data and its helpers.
Imported by: `langchain`, `litellm`.
"""
