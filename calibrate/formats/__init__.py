"""Files on disk: safetensors, checkpoints, quantised weights, names of scales, and what each engine loads."""
