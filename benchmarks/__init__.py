"""Benchmarks: `python -m benchmarks` runs them all. Timings are for reading, never asserted."""
