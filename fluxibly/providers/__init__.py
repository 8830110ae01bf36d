"""Providers: pure codecs, two HTTP shells that run any of them, and the frameworks that are no HTTP dialect."""
