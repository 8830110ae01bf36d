"""Providers: the modules and packages of the frameworks that configurations name, and the packages that they share.

`services.py` is the table of services that speak OpenAI's dialects; `dialects/` has the pure codecs, `http/` the client
that runs them, `_libraries/` the code shared by adapters of other libraries. A provider never imports a middleware.
"""
