"""Helpers for tests: calls in every mode, misbehaving servers, recorded exchanges, strategies, readers of spans."""
