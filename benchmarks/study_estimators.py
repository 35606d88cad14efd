"""Which estimator should be the default: measured on the embedded models, held-out data and planted outliers.

    python benchmarks/study_estimators.py --device cuda --out benchmarks/results/estimators.json

Every estimator chooses scales on samples of the training file; a float32 model then reads the reference answers of
5-shot problems of the test file with what enters its cache quantised and dequantised. Reported per variant: mean KL
to the unquantised cache. Planted cases reparametrise the model exactly (powers of two), so that its function stays
and its cache moves out of FP8's comfortable range.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

from fp8kv import __version__
from fp8kv.calibrate.capture import Capture
from fp8kv.calibrate.data.loading import Source, load_samples, make_batches
from fp8kv.calibrate.derive import derive_scales
from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import ModelFacts, model_facts
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer, pad_token_id
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.calibrate.statistics import KVStatistics, Provenance
from fp8kv.demo import MODELS, TEST_DATA, TRAIN_DATA
from fp8kv.kernels.fp8 import round_up_to_bfloat16
from fp8kv.recipes.schema import Scales
from fp8kv.runtime.evaluation.agreement import Agreement, measure_agreement
from fp8kv.runtime.evaluation.emulated_cache import (
    CacheMode,
    emulated_cache,
    fp8_at_unit_scale,
    fp8_with_scales,
    unquantised,
)
from fp8kv.runtime.evaluation.gsm8k import build_prompts, load_problems, reference_continuation
from fp8kv.runtime.evaluation.teacher_forcing import answer_logits, force

VARIANTS: dict[str, Scales] = {
    f"{name}{', power of two' if power else ''}{f', headroom {headroom:g}' if headroom != 1 else ''}": Scales(
        estimator=estimator, percentile=percent, headroom=headroom, power_of_two=power
    )
    for name, estimator, percent in (
        ("absmax", "absmax", 99.99),
        ("percentile 99.9", "percentile", 99.9),
        ("percentile 99.99", "percentile", 99.99),
        ("mse", "mse", 99.99),
    )
    for power in (False, True)
    for headroom in ((1.0, 2.0) if estimator != "percentile" else (1.0,))
}


def layer(model: nn.Module, index: int) -> nn.Module:
    return model.base_model.layers[index].self_attn


def raise_k(model: nn.Module, factor: float) -> None:
    attention = layer(model, 2)
    attention.k_norm.weight.mul_(factor)
    attention.q_norm.weight.div_(factor)


def raise_one_k_channel(model: nn.Module, factor: float) -> None:
    # channel 100 of 128 lies behind the rotated ones, so it may move alone
    attention = layer(model, 2)
    attention.k_norm.weight.view(-1, 128)[:, 100].mul_(factor)
    attention.q_norm.weight.view(-1, 128)[:, 100].div_(factor)


def lower_v(model: nn.Module, factor: float) -> None:
    attention = layer(model, 3)
    attention.v_proj.weight.div_(factor)
    attention.o_proj.weight.mul_(factor)


def raise_latent(model: nn.Module, factor: float) -> None:
    attention = layer(model, 2)
    attention.kv_a_layernorm.weight.mul_(factor)
    attention.kv_b_proj.weight.div_(factor)


CASES: list[tuple[str, str, Callable[[nn.Module], None]]] = [
    ("tiny-minimax-m2", "as trained", lambda model: None),
    ("tiny-minimax-m2", "K of layer 2 times 256", lambda model: raise_k(model, 256.0)),
    ("tiny-minimax-m2", "one K channel of layer 2 times 1024", lambda m: raise_one_k_channel(m, 1024.0)),
    ("tiny-minimax-m2", "one K channel of layer 2 times 16384", lambda m: raise_one_k_channel(m, 16384.0)),
    ("tiny-minimax-m2", "V of layer 3 over 65536", lambda model: lower_v(model, 65536.0)),
    ("tiny-deepseek-v3", "as trained", lambda model: None),
    ("tiny-deepseek-v3", "latent of layer 2 times 1024", lambda model: raise_latent(model, 1024.0)),
]  # fmt: skip


def calibrate(model: nn.Module, facts: ModelFacts, batches) -> KVStatistics:
    capture = Capture(model, facts)
    tokens = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    samples = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    for batch in batches:
        capture.run(batch)
        tokens[batch.fold] += batch.num_tokens
        samples[batch.fold] += len(batch.lengths)
    provenance = Provenance(
        "", "", facts.architecture, facts.attention, "float32", (), (), __version__
    )
    return KVStatistics(provenance, capture.finish(), tokens, samples)


def latent_only(stats: KVStatistics) -> ScaleSet:
    """What a calibrator writes that takes the cached pair of MLA for K and V: k_scale from the latent alone."""
    rows = []
    for entry in stats.layers:
        amax = entry.streams["LATENT"].channel_absmax.max()
        scale = (round_up_to_bfloat16(amax / 448).item(),)
        rows.append(LayerScales(entry.index, entry.name, scale, scale))
    return ScaleSet("mla", "e4m3fn", "tensor", tuple(rows))


def kl_of(model, facts, forced, modes: dict[str, CacheMode]) -> dict[str, dict[str, float]]:
    totals = {name: Agreement() for name in modes}
    for batch in forced:
        with emulated_cache(model, facts, unquantised()):
            expected = answer_logits(model, batch)
        for name, mode in modes.items():
            with emulated_cache(model, facts, mode):
                logits = answer_logits(model, batch)
            part = measure_agreement(logits, expected, batch.reference_tokens)
            totals[name] = totals[name].merge(part)
    return {
        name: {
            "kl": total.summary().kl,
            "kl_max": total.summary().kl_max,
            "nll": total.summary().nll,
            "top1": total.summary().top1_baseline,
            "tokens": total.num_tokens,
        }
        for name, total in totals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    problems = load_problems(TEST_DATA)[: arguments.problems]
    prompts = build_prompts(problems, load_problems(TRAIN_DATA))
    rows = []
    for name, case, plant in CASES:
        checkpoint = open_checkpoint(MODELS[name])
        facts = model_facts(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint, dtype=torch.float32, device=arguments.device)
        plant(model)
        samples = load_samples(
            [Source(str(TRAIN_DATA))], tokenizer, num_samples=arguments.samples, seq_len=512, seed=0
        )
        batches = make_batches(
            samples.samples, pad_token_id=pad_token_id(tokenizer), max_tokens=16384
        )
        stats = calibrate(model, facts, batches)
        forced = [
            force(
                tokenizer,
                prompts[i : i + arguments.batch_size],
                [reference_continuation(p) for p in problems[i : i + arguments.batch_size]],
            )
            for i in range(0, len(problems), arguments.batch_size)
        ]
        modes = {"scale 1.0": fp8_at_unit_scale()}
        for variant, options in VARIANTS.items():
            modes[variant] = fp8_with_scales(derive_scales(stats, options))
        if facts.attention == "mla" and case == "as trained":
            modes["latent-only k_scale (published failure)"] = fp8_with_scales(latent_only(stats))
        for variant, numbers in kl_of(model, facts, forced, modes).items():
            rows.append({"model": name, "case": case, "scales": variant, **numbers})
            print(f"{name:17} {case:38} {variant:40} KL {numbers['kl']:.2e}", flush=True)
    result = {
        "benchmark": "estimators",
        "problems": len(problems),
        "calibration_samples": arguments.samples,
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "fp8kv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
