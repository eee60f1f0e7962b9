"""Benchmarks: ratios measured in one interleaved run."""
