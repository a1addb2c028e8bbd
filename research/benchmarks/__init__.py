"""Benchmarks of the package, each run as `python -m research.benchmarks.NAME`; docs/performance.md has the results."""
