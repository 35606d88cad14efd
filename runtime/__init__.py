"""Accuracy of an FP8 cache: the same model, the same questions, the cache held in several ways."""
