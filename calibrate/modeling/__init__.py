"""The transformers model as calibration and the runtime both use it: loading, layers, the attention tap."""
