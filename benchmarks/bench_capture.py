"""What capture costs: the forward pass with statistics over the bare one, alternating, in one process.

    python benchmarks/bench_capture.py --shape llama-8b --device cuda --out result.json

The model has the named shape and random weights; token ids are random. Reported are the medians of the alternating
runs and their ratio. The target is a ratio of at most 1.10.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DeepseekV3Config, LlamaConfig, MiniMaxM2Config

from fp8kv import __version__
from fp8kv.calibrate.capture import Capture
from fp8kv.calibrate.data.batches import TokenBatch
from fp8kv.calibrate.formats.facts import LayerFacts, ModelFacts

SHAPES = {
    # name: configuration, batch, sequence length
    "tiny-gqa": (
        LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=2, head_dim=128, vocab_size=4096,
        ), 8, 512,
    ),
    "llama-1b": (
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=32000,
        ), 2, 1024,
    ),
    "llama-8b": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
            max_position_embeddings=8192,
        ), 16, 2048,
    ),
    "minimax-m2-layers": (
        MiniMaxM2Config(num_hidden_layers=2), 16, 2048,
    ),
    "deepseek-v3-layers": (
        DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1), 16, 2048,
    ),
}  # fmt: skip


def build(
    name: str, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, ModelFacts, TokenBatch]:
    config, batch, seq_len = SHAPES[name]
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(before)
    mla = getattr(config, "kv_lora_rank", None) is not None
    facts = ModelFacts(
        architecture=model_class.__name__,
        model_type=config.model_type,
        attention="mla" if mla else "gqa",
        layers=tuple(
            LayerFacts(i, f"model.layers.{i}.self_attn") for i in range(config.num_hidden_layers)
        ),
        num_kv_heads=None, head_dim=None, latent_dim=None, rope_dim=None, quant_method=None,
        quantization={}, quantization_location=(), static_scales=True, reason="",
    )  # fmt: skip
    token_ids = torch.randint(0, config.vocab_size, (batch, seq_len))
    return model, facts, TokenBatch(token_ids, torch.full((batch,), seq_len), fold=0)


def timed(run, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-gqa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    model, facts, batch = build(arguments.shape, arguments.device, dtype)
    capture = Capture(model, facts)
    token_ids = batch.token_ids.to(arguments.device)

    def bare() -> None:
        with torch.inference_mode():
            model.base_model(input_ids=token_ids, use_cache=False)

    def captured() -> None:
        capture.run(batch)

    for warm_up in (bare, captured, bare, captured):
        timed(warm_up, arguments.device)
    times = {"bare": [], "captured": []}
    for _ in range(arguments.rounds):
        times["bare"].append(timed(bare, arguments.device))
        times["captured"].append(timed(captured, arguments.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "benchmark": "capture",
        "shape": arguments.shape,
        "tokens": batch.num_tokens,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "bare_s": medians["bare"],
        "captured_s": medians["captured"],
        "ratio": medians["captured"] / medians["bare"],
        "ratio_low": min(times["captured"]) / max(times["bare"]),
        "ratio_high": max(times["captured"]) / min(times["bare"]),
        "fp8kv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
