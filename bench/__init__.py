"""Benchmarks: each checks first, measures after, and ends in one JSON line."""
