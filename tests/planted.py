"""Plant outliers in a trained model by exact reparametrisation: another cache, the same function.

A factor is a power of two, so moving it from one weight to the next changes no bit of what the model computes, but
what lies between the two, the cached tensor, is that many times as large.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.weight_stream import WeightStream

Planting = Callable[[dict[str, Tensor], str, float], None]


def scale_keys(weights: dict[str, Tensor], layer: str, factor: float) -> None:
    """Make K of a layer with QK-norm ``factor`` times as large."""
    weights[f"{layer}.k_norm.weight"] *= factor
    weights[f"{layer}.q_norm.weight"] /= factor


def scale_values(weights: dict[str, Tensor], layer: str, factor: float) -> None:
    """Make V of a layer ``factor`` times as large."""
    weights[f"{layer}.v_proj.weight"] *= factor
    weights[f"{layer}.o_proj.weight"] /= factor


def scale_latent(weights: dict[str, Tensor], layer: str, factor: float) -> None:
    """Make the latent of an MLA layer ``factor`` times as large, and leave its rope part."""
    weights[f"{layer}.kv_a_layernorm.weight"] *= factor
    weights[f"{layer}.kv_b_proj.weight"] /= factor


def plant(source: Path, directory: Path, layer: str, planting: Planting, factor: float) -> None:
    """Write a float32 checkpoint that computes what ``source`` does, with one cached tensor scaled.

    Raises:
        ValueError: the factor is no power of two.
    """
    if 2.0 ** round(torch.tensor(factor).log2().item()) != factor:
        raise ValueError(f"{factor} is no power of two")
    checkpoint = open_checkpoint(source)
    # float32 throughout, which holds the product of a decoded weight and any such factor exactly
    with WeightStream(checkpoint, dtype=torch.float32, device=torch.device("cpu")) as stream:
        weights = {name: weight[...].float() for name, weight in stream.weights.items()}
    planting(weights, layer, factor)
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if "quant" not in key}
    config["torch_dtype"] = "float32"
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, directory / name)
