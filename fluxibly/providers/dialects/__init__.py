"""What services say, as pure codecs: requests to bytes, bytes to answers. Nothing here touches a socket or waits.

`codec.py` is the protocol; a dialect is a module (`anthropic.py`, `gemini.py`, `ollama.py`, `openai_chat.py`,
`openai_responses.py`); they share `framing.py`, `errors.py`, `encoding.py`, `decoding.py` and `json_values.py`.
Imports: only data. Usable without httpx. Imported by: `providers`, `testing`.
"""
