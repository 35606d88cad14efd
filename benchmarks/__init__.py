"""Benchmarks of fp8kv. Each module says in its docstring how it is run; its results lie in ``benchmarks/results/``."""
