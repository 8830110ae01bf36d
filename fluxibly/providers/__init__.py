"""The providers: a module or package here for each framework that configurations name, and the rooms they stand on.

`services.py` is the table of services that speak OpenAI's dialects; `dialects/` has the pure codecs, `http/` the client
that runs them, `_libraries/` what the adapters of other libraries share. A provider never imports a middleware.
"""
