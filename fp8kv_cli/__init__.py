"""fp8kv: calibrate FP8 KV-cache scales, write them into checkpoints, and prove them right."""

__version__ = "0.1.0"
