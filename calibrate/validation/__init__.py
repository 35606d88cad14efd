"""Checking what was written, by fp8kv or by anybody else."""
