"""Evaluation: benchmarks and the statistics around them."""
