"""Benchmarks. `python -m benchmarks` runs all of them. Timings are printed for the reader and never asserted."""
