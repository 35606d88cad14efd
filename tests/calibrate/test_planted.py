"""Models whose cache scale 1.0 ruins, and the scales that restore them.

The trained models are reparametrised exactly, so that one layer's K, V or latent leaves what FP8 holds at scale 1.0.
Accuracy is the divergence from the unquantised cache, teacher-forced on reference answers, the model itself unmodified.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from fp8kv.calibrate import LayerScales, ScaleSet, calibrate
from fp8kv.demo import TEST_DATA, TRAIN_DATA
from fp8kv.kernels.fp8 import round_up_to_bfloat16
from fp8kv.recipes import default_recipe, override
from fp8kv.runtime.evaluation.agreement import measure_agreement
from fp8kv.runtime.evaluation.emulated_cache import (
    emulated_cache,
    fp8_at_unit_scale,
    fp8_with_scales,
)
from fp8kv.runtime.evaluation.gsm8k import build_prompts, load_problems, reference_continuation
from fp8kv.runtime.evaluation.teacher_forcing import answer_logits, force

PROBLEMS, SHOTS = 8, 1


@dataclass(frozen=True)
class Case:
    """What is planted, and what a calibration must say of it.

    Attributes:
        base: the fixture of the trained model.
        layer: where.
        planting: a function of the module ``planted``.
        factor: on the cached tensor.
        stream: the cached tensor.
        verdict: what scale 1.0 does to it.
    """

    base: str
    layer: str
    planting: str
    factor: float
    stream: str
    verdict: str


CASES = {
    # K, of at most 8 by nature, to 8,000
    "k-raised": Case("minimax", "model.layers.1.self_attn", "scale_keys", 2.0**10, "K", "clip"),
    # V, of 1.6 on average by nature, to a fifth of the smallest subnormal number
    "v-lowered": Case(
        "minimax", "model.layers.1.self_attn", "scale_values", 2.0**-12, "V", "underflow"
    ),
    # the latent, of at most 6 by nature, to 6,000; the rope part stays below 24
    "latent-raised": Case(
        "deepseek", "model.layers.3.self_attn", "scale_latent", 2.0**10, "LATENT", "clip"
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Calibrate a directory, once, on problems that are not among the tested ones."""
    results = {}
    recipe = override(
        default_recipe(),
        {
            "data.sources": [{"dataset": str(TRAIN_DATA)}],
            "data.num_samples": 16,
            "data.seq_len": 192,
        },
    )

    def get(path):
        if path not in results:
            out = tmp_path_factory.mktemp("calibrated") / "out"
            results[path] = calibrate(str(path), out, recipe=recipe, device="cpu")
        return results[path]

    return get


@pytest.fixture(scope="module")
def forced(minimax):
    """Problems with their reference answers; one tokenizer serves both models."""
    problems = load_problems(TEST_DATA)[:PROBLEMS]
    prompts = build_prompts(problems, load_problems(TRAIN_DATA), SHOTS, same_split=False)
    return force(minimax.tokenizer, prompts, [reference_continuation(one) for one in problems])


@pytest.fixture(scope="module")
def baselines(minimax, deepseek, forced):
    """The trained models' logits with the unquantised cache."""
    return {
        "minimax": answer_logits(minimax.model, forced),
        "deepseek": answer_logits(deepseek.model, forced),
    }


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def subject(request, case, planted, load, tmp_path_factory):
    """The planted model."""
    path = tmp_path_factory.mktemp("planted") / "model"
    source = request.getfixturevalue(case.base).path
    planted.plant(source, path, case.layer, getattr(planted, case.planting), case.factor)
    return load(path)


def divergence(loaded, mode, forced, baseline):
    with emulated_cache(loaded.model, loaded.facts, mode):
        logits = answer_logits(loaded.model, forced)
    return measure_agreement(logits, baseline, forced.reference_tokens).summary()


def test_the_planted_model_computes_the_same_bits(case, subject, forced, baselines):
    assert torch.equal(answer_logits(subject.model, forced), baselines[case.base])


def test_the_verdict_names_what_was_planted_and_nothing_else(case, subject, run):
    verdicts = {(one.layer, one.stream): one.verdict for one in run(subject.path).verdicts}
    assert verdicts.pop((case.layer, case.stream)) == case.verdict
    assert set(verdicts.values()) == {"flat"}


def test_calibration_restores_what_scale_1_ruins(
    case, subject, forced, baselines, run, record_property
):
    scales = run(subject.path).scales
    at_unit = divergence(subject, fp8_at_unit_scale(), forced, baselines[case.base])
    at_scale = divergence(subject, fp8_with_scales(scales), forced, baselines[case.base])
    record_property("KL at scale 1.0", at_unit.kl)
    record_property("KL at the calibrated scales", at_scale.kl)
    record_property("top-1 at scale 1.0", at_unit.top1_baseline)
    record_property("top-1 at the calibrated scales", at_scale.top1_baseline)
    assert at_unit.kl > 0.1
    assert at_scale.kl < 1e-3
    assert at_scale.top1_baseline > 0.995 > at_unit.top1_baseline


def test_the_chosen_scale_moves_with_what_was_planted(request, case, subject, run):
    plain = run(request.getfixturevalue(case.base).path).scales
    for before, after in zip(plain.layers, run(subject.path).scales.layers, strict=True):
        if after.name != case.layer:
            assert after == before
        elif case.stream == "LATENT":
            # the rope part held the row's scale before, so the row's maximum grows by less
            assert before.k[0] < after.k[0] == after.v[0] < before.k[0] * case.factor
        else:
            k, v = (case.factor, 1) if case.stream == "K" else (1, case.factor)
            assert (after.k, after.v) == ((before.k[0] * k,), (before.v[0] * v,))


def test_a_scale_that_knows_the_latent_alone_fails_and_ours_does_not(
    deepseek, forced, baselines, run, record_property
):
    result = run(deepseek.path)
    layers = []
    for layer in result.stats.layers:
        latent = layer.streams["LATENT"].channel_absmax.max()
        scale = tuple(round_up_to_bfloat16((latent / 448).view(1)).tolist())
        layers.append(LayerScales(layer.index, layer.name, scale, scale))
    latent_only = ScaleSet("mla", "e4m3fn", "tensor", tuple(layers))
    theirs = divergence(deepseek, fp8_with_scales(latent_only), forced, baselines["deepseek"])
    ours = divergence(deepseek, fp8_with_scales(result.scales), forced, baselines["deepseek"])
    record_property("KL at the latent's scale", theirs.kl)
    record_property("KL at the calibrated scales", ours.kl)
    assert theirs.kl > 0.05
    assert ours.kl < 1e-4
    for layer, chosen, small in zip(
        result.stats.layers, result.scales.layers, latent_only.layers, strict=True
    ):
        row = max(stream.channel_absmax.max().item() for stream in layer.streams.values())
        assert chosen.k[0] == 2.0 ** math.ceil(math.log2(row / 448))
        # the rope part clips at theirs
        assert row / small.k[0] > 2 * 448
