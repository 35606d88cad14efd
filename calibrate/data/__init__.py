"""Calibration data: from a dataset's name or a file to batches of tokens, deterministically."""
