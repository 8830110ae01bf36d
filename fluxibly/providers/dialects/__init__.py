"""Pure codecs for the dialects of services: requests to bytes, bytes to responses. No code here does I/O or waits.

`codec.py` defines the protocol. Each dialect is a module (`anthropic.py`, `gemini.py`, `ollama.py`, `openai_chat.py`,
`openai_responses.py`). The dialects share `framing.py`, `errors.py`, `encoding.py`, `decoding.py` and `json_values.py`.
Imports: only data modules. Usable without httpx. Imported by: `providers`, `testing`.
"""
