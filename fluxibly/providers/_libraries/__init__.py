"""What the providers that stand on another library (LangChain, LiteLLM) share.

Such a library sends the requests itself. `calls.py` holds the limits of `Timeouts` from outside and reads what a
configuration means to it; `loops.py` closes what belongs to an event loop along with it; `services.py` describes who
answers; `errors.py` makes its exceptions ours. Imports: `dialects`, `config`, data. Imported by: `langchain`, `litellm`.
"""
