#!/usr/bin/env python3
"""Turn a BF16 tiny model into a checkpoint of the layout that the real model is published in: FP8, 128x128 blocks.

Quantised are the linear layers that MiniMaxAI/MiniMax-M2 and deepseek-ai/DeepSeek-V3 quantise: attention projections,
experts, shared experts and dense MLPs. Norms, embeddings, lm_head, routers and biases stay as they are. config.json
gets the published keys (top-level rope_theta, torch_dtype, quantization_config) in place of those of transformers 5.

Example:
  make_fp8.py tiny-minimax-m2 ../../fp8kv_cli/demo/models/tiny-minimax-m2
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import INDEX_FILE, Checkpoint, open_checkpoint
from fp8kv.calibrate.formats.fp8_block import quantize_block

BLOCK = 128
QUANTISED = re.compile(
    r"model\.layers\.\d+\.(?:"
    r"self_attn\.(?:q|k|v|o|q_a|q_b|kv_b)_proj"
    r"|self_attn\.kv_a_proj_with_mqa"
    r"|block_sparse_moe\.experts\.\d+\.w[123]"
    r"|mlp\.(?:experts\.\d+\.|shared_experts\.)?(?:gate|up|down)_proj"
    r")\.weight"
)
COPIED = ("chat_template.jinja", "generation_config.json", "tokenizer_config.json")


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="BF16 checkpoint written by train_tiny.py")
    parser.add_argument("out", type=Path, help="directory to write, which must not exist")
    parser.add_argument("--shards", type=int, default=2)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out, arguments.shards)


def convert(source: Path, out: Path, num_shards: int) -> None:
    """Write the FP8 form of the checkpoint ``source`` to the new directory ``out``."""
    checkpoint = open_checkpoint(source)
    out.mkdir(parents=True)
    write_shards(quantise(checkpoint), out, num_shards)
    write_json(out / "config.json", published_config(dict(checkpoint.config)), indent=2)
    for name in COPIED:
        shutil.copyfile(source / name, out / name)
    # Without its white space, a third smaller.
    write_json(out / "tokenizer.json", json.loads((source / "tokenizer.json").read_text()))


def quantise(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Return the tensors in model order, each quantised weight together with its scales."""
    groups = []
    for name in sorted(checkpoint.weight_map, key=model_order):
        tensor = checkpoint.read(name)
        if QUANTISED.fullmatch(name):
            codes, scales = quantize_block(tensor, BLOCK)
            groups.append({name: codes, f"{name}_scale_inv": scales})
        else:
            groups.append({name: tensor})
    return groups


def model_order(name: str) -> tuple[int, list[str | int]]:
    """Sort embeddings first, then the layers by number, then the final norm, then the head."""
    stage = ["model.embed_tokens", "model.layers", "model.norm", "lm_head"]
    rank = next(i for i, prefix in enumerate(stage) if name.startswith(prefix))
    return rank, [f"{int(part):06d}" if part.isdigit() else part for part in name.split(".")]


def write_shards(groups: list[dict[str, Tensor]], out: Path, num_shards: int) -> None:
    """Write ``num_shards`` files of about the same size, and their index."""
    total = sum(tensor.nbytes for group in groups for tensor in group.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    written = 0
    for group in groups:
        shards[min(written * num_shards // total, num_shards - 1)].update(group)
        written += sum(tensor.nbytes for tensor in group.values())
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        (out / file_name).chmod(0o644)  # the library leaves it private
        weight_map.update(dict.fromkeys(tensors, file_name))
    write_json(
        out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2
    )


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the keys of the published configs, which were written by transformers 4."""
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = int(config.pop("rope_parameters")["rope_theta"])
    quantization: dict[str, Any] = {"activation_scheme": "dynamic"}
    if config["model_type"] == "minimax_m2":
        config["attn_type_list"] = [1] * config["num_hidden_layers"]
        config["shared_intermediate_size"] = 0
        quantization["fmt"] = "float8_e4m3fn"
        quantization["modules_to_not_convert"] = ["gate", "e_score_correction_bias", "lm_head"]
    elif config["model_type"] == "deepseek_v3":
        for key in ("head_dim", "qk_head_dim", "rope_interleave"):
            del config[key]  # unknown to the published config; transformers derives the same values
        config["rope_scaling"] = None
        quantization["fmt"] = "e4m3"
    else:
        raise SystemExit(f"no published layout known for model_type {config['model_type']}")
    quantization["quant_method"] = "fp8"
    quantization["weight_block_size"] = [BLOCK, BLOCK]
    config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write ``value`` as JSON, without any white space if ``indent`` is None."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
