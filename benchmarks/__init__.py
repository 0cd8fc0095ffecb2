"""Benchmarks: correctness first, then timings. `python -m benchmarks --help`."""
