"""Evaluation: the public benchmarks by their published protocols, and suites of one's own."""
