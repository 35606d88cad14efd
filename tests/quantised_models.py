"""Checkpoints with quantised weights, made from plain ones, and what their weights decode to.

Written from the descriptions of the formats, apart from the decoders under test.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}
_LINEAR = re.compile(r".*layers\.\d+\..*_proj\.weight")


def save_int4(source: Path, directory: Path) -> dict[str, Tensor]:
    """Write ``source``, one file of plain weights, with its layers packed to INT4; return what they decode to."""
    shutil.copytree(source, directory)
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not _LINEAR.fullmatch(name):
            stored[name] = decoded[name] = weight
            continue
        groups = weight.unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        values = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7)
        decoded[name] = (values * scale.unsqueeze(-1)).flatten(1)
        base = name.removesuffix("weight")
        stored[f"{base}weight_packed"] = _pack(values.flatten(1))
        stored[f"{base}weight_scale"] = scale
        stored[f"{base}weight_shape"] = torch.tensor(weight.shape)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    set_config(directory, quantization_config=INT4_CONFIG)
    return decoded


def set_config(directory: Path, **changes: object) -> None:
    """Change keys of ``config.json``; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _pack(values: Tensor) -> Tensor:
    """Put eight columns into a word, the first into the lowest four bits, each as value + 8."""
    nibbles = (values.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
