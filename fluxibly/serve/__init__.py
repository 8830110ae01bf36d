"""A stack behind OpenAI's HTTP API, for programs in any language: `fluxibly serve`, or `application` in a server of yours.

`_requests` reads what clients send, `_answers` makes the calls and sends their answers, `_gate` lets requests in and logs them,
and `_server` runs uvicorn. It needs the extra `serve`.
"""

from fluxibly.serve._application import application

__all__ = ["application"]
