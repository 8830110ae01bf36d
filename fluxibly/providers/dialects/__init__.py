"""Pure codecs for the dialects of services: requests to bytes, bytes to responses. No code here does I/O or waits.

`codec.py` defines the protocol. Each dialect is a module (`anthropic.py`, `bedrock.py`, `cohere.py`, `gemini.py`, `ollama.py`,
`openai_chat.py`, `openai_responses.py`; OpenAI's two share `openai_request.py` and `openai_parts.py`). `vertex.py` writes
and reads two of them. All share `errors.py`,
`retry_after.py`, `schemas.py`, `encoding.py`, `decoding.py` and `json_values.py`. `framing.py` splits a stream's bytes into events.
Imports: only data modules. Usable without httpx. Imported by: `providers`, `testing`.
"""
