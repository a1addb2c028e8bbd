"""Research behind the package, not part of it: the study, benchmarks, variants and their results."""
