"""Decode steps of slices of DeepSeek-V3's and MiniMax-M2's shape, FP8 cache against BF16 cache.

    python -m benchmarks.runtime.slices --out result.json

Four layers with random weights, a batch of sequences of 8K, 32K and 128K tokens whose pages hold random numbers: what a
step takes depends on lengths, not on what is in the pages. Times are of the GPU, by events around replayed graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path

import torch
import transformers

from fp8kv import __version__
from fp8kv.runtime.architectures import check_supported
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.decode_graphs import DecodeGraphs
from fp8kv.runtime.model_runner import ModelRunner
from fp8kv.runtime.paged_cache import build_cache, measure_dims

from .shapes import build

PAGE_SIZE = 64
LENGTHS = (8192, 32768, 131072)
BATCH = {"deepseek-v3, 4 layers": 32, "minimax-m2, 4 layers": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(BATCH))
    arguments = parser.parse_args()
    result = {
        "benchmark": "runtime, decode step",
        "gpu": torch.cuda.get_device_name(),
        "fp8kv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [],
    }
    for shape in arguments.shapes:
        model = build(shape)
        for mode in ("fp8", "bf16"):
            result["rows"] += measure(model, shape, mode)
            gc.collect()
            torch.cuda.empty_cache()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: torch.nn.Module, shape: str, mode: str) -> list[dict]:
    batch_size = BATCH[shape]
    modules = check_supported(model)
    num_pages = batch_size * (LENGTHS[-1] // PAGE_SIZE)
    # no scales: both caches hold the same random numbers, and 1.0 costs what any scale does
    cache = build_cache(
        modules, measure_dims(model, modules), mode="fp8-unit" if mode == "fp8" else mode,
        num_pages=num_pages, page_size=PAGE_SIZE, device="cuda", scales=None,
    )  # fmt: skip
    for layer in cache.layers.values():
        for pages in (layer.k, layer.v):
            if pages is not None:
                fill(pages)
    rows = []
    with ModelRunner(model, cache, choose_backend(None, torch.device("cuda"))) as runner:
        graphs = DecodeGraphs(runner, max_sequences=batch_size, max_seq_len=LENGTHS[-1])
        for length in LENGTHS:
            order = torch.randperm(num_pages).tolist()
            count = length // PAGE_SIZE
            batch = make_batch(
                [
                    ([7 + row], length - 1, order[row * count : (row + 1) * count])
                    for row in range(batch_size)
                ],
                PAGE_SIZE,
                "cuda",
            )
            step_ms = time_ms(lambda batch=batch: graphs.forward(batch))
            rows.append(
                {
                    "shape": shape,
                    "cache": mode,
                    "batch": batch_size,
                    "length": length,
                    "step_ms": round(step_ms, 3),
                    "cache_GB": round(cache.bytes_per_token * batch_size * length / 1e9, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def fill(pages: torch.Tensor) -> None:
    """Write random numbers of deviation 1, page by page: a whole cache at once would need as much again."""
    for start in range(0, len(pages), 4096):
        part = pages[start : start + 4096]
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))


def time_ms(call) -> float:
    for _ in range(4):
        call()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        start.record()
        for _ in range(3):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
