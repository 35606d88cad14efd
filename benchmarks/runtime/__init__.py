"""Benchmarks of the runtime on one GPU: a whole batch of requests, and decode steps of slices of large models."""
