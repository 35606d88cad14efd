"""A whole batch on the Llama-3-8B shape: 64 requests of 4096 prompt tokens and 128 new ones, greedy.

    python -m benchmarks.runtime.llama --out result.json

Ours with an FP8 and with a BF16 cache, and transformers' ``generate``, in one process; weights and prompts are random.
Floors: the prompts' operations at the sustained rate of a matrix product, and for each decode step the bytes of the
weights and of the cache at the rate of a copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList

from fp8kv import __version__
from fp8kv.runtime.llm import LLM, LoadedModel
from fp8kv.runtime.requests import Request
from fp8kv.runtime.sampling import SamplingParameters

from .floors import Ceilings, measure_ceilings
from .shapes import build, build_tokenizer

SHAPE = "llama-3-8b"
REQUESTS, PROMPT, NEW = 64, 4096, 128
MEMORY = 40 << 30
"""What the caches are compared at: bytes of pages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--modes", nargs="+", default=["fp8", "bf16"])
    parser.add_argument("--small", action="store_true", help="8 requests, to see that it runs")
    arguments = parser.parse_args()
    global REQUESTS
    if arguments.small:
        REQUESTS = 8
    start = time.perf_counter()
    ceilings = measure_ceilings()
    model = build(SHAPE)
    tokenizer = build_tokenizer(model.config.vocab_size)
    result = {
        "benchmark": "runtime, whole batch",
        "shape": SHAPE,
        "requests": REQUESTS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "gpu": torch.cuda.get_device_name(),
        "copy_tbps": round(ceilings.copy_tbps, 3),
        "bf16_tflops": round(ceilings.bf16_tflops),
        "fp8kv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [],
    }
    for mode in arguments.modes:
        row = run_ours(model, tokenizer, mode)
        result["rows"].append(row | floors(model, ceilings, mode, row))
        print(json.dumps(result["rows"][-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.peer:
        row = run_transformers(model)
        result["rows"].append(row | floors(model, ceilings, "bf16", row))
        print(json.dumps(result["rows"][-1]), flush=True)
    result["seconds"] = round(time.perf_counter() - start)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def prompts(vocab_size: int, seed: int, count: int, length: int = PROMPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (count, length), generator=generator)


def run_ours(model: torch.nn.Module, tokenizer, mode: str) -> dict:
    """Return totals and steps of the second of two runs: the first compiles kernels and captures graphs."""
    page_bytes = 64 * 2 * 8 * 128 * 32 * (1 if mode.startswith("fp8") else 2)
    llm = LLM(
        LoadedModel(model, tokenizer),
        cache=mode,
        num_pages=MEMORY // page_bytes,
        max_sequences=REQUESTS,
    )
    with llm:
        for seed in (1, 2):
            steps = []
            for prompt in prompts(model.config.vocab_size, seed, REQUESTS).tolist():
                parameters = SamplingParameters(max_tokens=NEW, ignore_eos=True)
                llm.engine.add(Request(tuple(prompt), parameters))
            torch.cuda.synchronize()
            begin = last = time.perf_counter()
            generated = 0
            while llm.engine.has_work:
                generated += sum(len(output.token_ids) for output in llm.engine.step())
                now = time.perf_counter()
                steps.append((now - last, llm.engine.status.num_computed_tokens))
                last = now
            total = last - begin
        computed = [0] + [count for _, count in steps]
        decode = [
            took for (took, count), before in zip(steps, computed, strict=False)
            if count - before == REQUESTS
        ]  # fmt: skip
        step_ms = 1e3 * statistics.median(decode[len(decode) // 4 :])
        capacity = llm.engine.status.num_pages * 64 // (PROMPT + NEW)
        gpu_ms = graph_ms(llm)
    if generated != REQUESTS * NEW:
        raise SystemExit(f"{generated} tokens came, not {REQUESTS * NEW}: the times mean nothing.")
    return {
        "runner": f"fp8kv, {mode} cache",
        "total_s": round(total, 3),
        "tokens_per_s": round(generated / total, 1),
        "decode_steps_timed": len(decode),
        "step_ms": round(step_ms, 3),
        "gpu_step_ms": round(gpu_ms, 3),
        "host_ms_beside_gpu": round(step_ms - gpu_ms, 3),
        "sequences_in_40_GiB": capacity,
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


def graph_ms(llm: LLM) -> float:
    """Return what the GPU takes for a decode step, back to back, at the middle of the run's lengths."""
    from fp8kv.runtime.batch import make_batch

    length = PROMPT + NEW // 2
    pages = -(-(length + 1) // 64)
    batch = make_batch(
        [([5], length, list(range(row * pages, (row + 1) * pages))) for row in range(REQUESTS)],
        64,
        "cuda",
    )
    for _ in range(4):
        llm.runner.forward(batch)
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        start.record()
        for _ in range(4):
            llm.runner.forward(batch)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return statistics.median(times)


class _Clock(StoppingCriteria):
    def __init__(self) -> None:
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_transformers(model: torch.nn.Module) -> dict:
    """Time ``generate`` with the dynamic cache and SDPA: its fastest way at equal lengths."""
    model.set_attn_implementation("sdpa")

    def generate(count: int, length: int, new: int) -> tuple[float, _Clock]:
        clock = _Clock()
        ids = prompts(model.config.vocab_size, 3, count, length).cuda()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start, clock

    generate(4, PROMPT, 4)
    torch.cuda.reset_peak_memory_stats()
    total, clock = generate(REQUESTS, PROMPT, NEW)
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "runner": "transformers generate, dynamic cache, sdpa",
        "total_s": round(total, 3),
        "tokens_per_s": round(REQUESTS * NEW / total, 1),
        "step_ms": round(1e3 * statistics.median(steps[len(steps) // 4 :]), 3),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


def floors(model: torch.nn.Module, ceilings: Ceilings, mode: str, row: dict) -> dict:
    """Return the least time of the batch and of a step, and how far a run is from them."""
    config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    # every parameter takes part in two operations a token; the last layer's head in one token of a prompt only
    parameters = sum(p.numel() for p in model.parameters()) - embedding
    head = model.get_output_embeddings().weight.numel()
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    prefill_flop = REQUESTS * PROMPT * (2 * (parameters - head) + attention * PROMPT / 2)
    prefill_s = prefill_flop / ceilings.bf16_tflops / 1e12
    itemsize = 1 if mode.startswith("fp8") else 2
    token_bytes = (
        2 * itemsize * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )
    step_bytes = 2 * parameters + REQUESTS * (PROMPT + NEW / 2) * token_bytes
    step_ms = step_bytes / ceilings.copy_tbps / 1e9
    total_s = prefill_s + (NEW - 1) * step_ms / 1e3
    return {
        "floor_total_s": round(total_s, 3),
        "floor_step_ms": round(step_ms, 3),
        "total_over_floor": round(row["total_s"] / total_s, 3),
        "step_over_floor": round(row["step_ms"] / step_ms, 3),
    }


if __name__ == "__main__":
    main()
