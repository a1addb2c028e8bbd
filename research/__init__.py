"""What supports the package and is not part of it: the study, benchmarks, variants and their results."""
