"""Ways to count a histogram of magnitudes on a GPU, timed on the same data.

    python benchmarks/bench_histogram.py --out result.json

33.5 M bfloat16 values in 8 heads, as K of 32,768 tokens of a Llama-3-8B shape. Medians of repeated runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from triton.testing import do_bench

from fp8kv import __version__
from fp8kv.calibrate.histogram import count_magnitudes

NUM_CODES = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    values = torch.randn(16, 8, 2048, 128, device="cuda").bfloat16().abs()
    num_heads = values.shape[1]
    codes = (values.view(torch.int16) >> 3).to(torch.int32)
    heads = torch.arange(num_heads, device="cuda", dtype=torch.int32)[:, None, None]
    shifted = (codes + heads * NUM_CODES).flatten()
    edges = torch.arange(NUM_CODES, device="cuda", dtype=torch.int16).expand(num_heads, -1)
    edges = edges.contiguous()

    def histc() -> torch.Tensor:
        return torch.stack(
            [
                torch.histc(codes[:, h], bins=NUM_CODES, min=0, max=NUM_CODES)
                for h in range(num_heads)
            ]
        )

    def bincount() -> torch.Tensor:
        return torch.bincount(shifted, minlength=num_heads * NUM_CODES).view(num_heads, -1)

    def bincount_per_head() -> torch.Tensor:
        return torch.stack(
            [torch.bincount(codes[:, h].flatten(), minlength=NUM_CODES) for h in range(num_heads)]
        )

    def scatter_add() -> torch.Tensor:
        counts = torch.zeros(num_heads * NUM_CODES, device="cuda", dtype=torch.int32)
        return counts.scatter_add_(0, shifted.long(), torch.ones_like(shifted)).view(num_heads, -1)

    def sort() -> torch.Tensor:
        rows = codes.to(torch.int16).transpose(0, 1).reshape(num_heads, -1).sort(dim=1).values
        below = torch.searchsorted(rows, edges, right=True)
        return below.diff(dim=1, prepend=torch.zeros_like(below[:, :1]))

    expected = histc().long()
    rows = {}
    for run in (histc, bincount, bincount_per_head, scatter_add, sort):
        if not torch.equal(run().long(), expected):
            raise SystemExit(f"{run.__name__} counts differently")
        rows[run.__name__] = do_bench(run, warmup=20, rep=100, return_mode="median")
    rows["count_magnitudes (whole)"] = do_bench(
        lambda: count_magnitudes(values), warmup=20, rep=100, return_mode="median"
    )
    result = {
        "benchmark": "histogram",
        "values": values.numel(),
        "milliseconds": rows,
        "device": torch.cuda.get_device_name(),
        "fp8kv": __version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
