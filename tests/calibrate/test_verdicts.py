"""Verdicts on planted statistics, the held-out check, and the convergence curve."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.capture import _Accumulator, _Batch
from fp8kv.calibrate.derive import derive_scales
from fp8kv.calibrate.folds import CALIBRATION_FOLDS, HELD_OUT_FOLD, NUM_FOLDS
from fp8kv.calibrate.rotary import RotaryLayout
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.calibrate.statistics import KVStatistics, LayerStatistics, Provenance
from fp8kv.calibrate.verdicts import convergence, judge
from fp8kv.kernels.fp8 import FORMATS, get_format, quantize_dequantize
from fp8kv.recipes.schema import Scales

HEADS, WIDTH, TOKENS = 2, 16, 256
ALL_FOLDS = tuple(range(NUM_FOLDS))

all_formats = pytest.mark.parametrize("fp8_format", FORMATS)


def rows(seed, size=1.0, heads=HEADS, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, TOKENS, width, generator=generator) * size


def in_folds(seed, size=1.0, folds=ALL_FOLDS, **shape):
    return {fold: rows(100 * seed + fold, size, **shape) for fold in folds}


def measure(attention, layers):
    """Return statistics; a layer is ``{stream: {fold: [1, heads, tokens, width]}}``."""
    tokens = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    measured = []
    for index, streams in enumerate(layers):
        found = {}
        for name, by_fold in streams.items():
            layout = RotaryLayout(4, "halves") if name in ("K", "ROPE") else None
            accumulator = _Accumulator(next(iter(by_fold.values())), layout)
            for fold, data in by_fold.items():
                accumulator.update(data, _Batch(fold, None))
                tokens[fold] = data.shape[2]
            found[name] = accumulator.finish()
        measured.append(LayerStatistics(index, f"model.layers.{index}.self_attn", found))
    provenance = Provenance("m", "d", "A", attention, "float32", ("r",), ("t",), "0.1.0")
    return KVStatistics(provenance, tuple(measured), tokens, (tokens > 0).long())


def gqa(keys, values=None):
    return measure("gqa", [{"K": keys, "V": values or in_folds(50)}])


def judged(stats, **options):
    """Return ``{stream: verdict}`` of the first layer at the scales that are chosen for it."""
    return {v.stream: v for v in judge(stats, derive_scales(stats, Scales(**options)))}


def measured_error(data, scale, fp8_format="e4m3fn"):
    """Return the root of noise over signal of ``[1, heads, tokens, width]`` data."""
    stored = quantize_dequantize(data, scale, get_format(fp8_format))
    noise = (stored.double() - data.double()).square().sum()
    return math.sqrt(noise / data.double().square().sum())


@all_formats
@pytest.mark.parametrize("size", [0.05, 1.0, 8.0])
def test_data_inside_the_format_is_flat(fp8_format, size):
    verdict = judged(gqa(in_folds(1, size)), fp8_format=fp8_format)["K"]
    assert verdict.verdict == "flat"
    assert verdict.note == ""
    assert verdict.at_unit.clipped == verdict.at_scale.clipped == 0
    assert verdict.at_unit.relative_error == pytest.approx(verdict.at_scale.relative_error, rel=0.1)


@all_formats
def test_data_above_the_largest_code_clips_at_scale_one(fp8_format):
    limit = get_format(fp8_format).max
    keys = in_folds(2, limit)
    verdict = judged(gqa(keys), fp8_format=fp8_format)["K"]
    assert verdict.verdict == "clip"
    share = torch.cat([keys[fold] for fold in CALIBRATION_FOLDS]).abs() > limit
    assert verdict.at_unit.clipped == pytest.approx(share.double().mean().item(), rel=0.05)
    assert verdict.at_unit.relative_error > 5 * verdict.at_scale.relative_error
    assert verdict.at_scale.clipped == 0


@all_formats
def test_data_among_the_subnormals_underflows_at_scale_one(fp8_format):
    values = in_folds(3, get_format(fp8_format).smallest_subnormal)
    verdict = judged(gqa(in_folds(1), values), fp8_format=fp8_format)["V"]
    assert verdict.verdict == "underflow"
    assert verdict.at_unit.subnormal > 0.95
    assert verdict.at_unit.relative_error > 5 * verdict.at_scale.relative_error
    assert verdict.at_scale.subnormal < 0.05


def test_one_value_above_the_largest_code_is_enough_to_clip():
    keys = in_folds(4)
    keys[2] = keys[2].clone()
    keys[2][0, 1, 5, 7] = -448.0
    assert judged(gqa(keys))["K"].verdict == "flat"
    keys[2][0, 1, 5, 7] = -449.0
    assert judged(gqa(keys))["K"].verdict == "clip"


def test_a_verdict_says_what_was_measured():
    keys = in_folds(5, 20.0)
    keys[0] = keys[0].clone()
    keys[0][0, 0, 0, 3] = 300.0  # a sink in the first token
    keys[0][0, 1, 9, 1], keys[0][0, 1, 9, 3] = 390.0, -80.0  # a rotary pair
    verdict = judged(gqa(keys))["K"]
    assert verdict.layer == "model.layers.0.self_attn"
    assert verdict.absmax == 390.0
    assert verdict.first_token_absmax == 300.0
    assert verdict.pair_norm == pytest.approx(math.hypot(390.0, 80.0))
    assert verdict.scale == 1.0
    assert judged(gqa(keys))["V"].pair_norm is None


@all_formats
@pytest.mark.parametrize("size", [1e-4, 1.0, 3000.0])
def test_quality_is_that_of_the_data_within_the_reach_of_prediction(fp8_format, size):
    keys = in_folds(6, size)
    verdict = judged(gqa(keys), fp8_format=fp8_format, power_of_two=False)["K"]
    calibration = torch.cat([keys[fold] for fold in CALIBRATION_FOLDS])
    for quality, data, scale in (
        (verdict.at_unit, calibration, 1.0),
        (verdict.at_scale, calibration, verdict.scale),
        (verdict.held_out, keys[HELD_OUT_FOLD], verdict.scale),
    ):
        expected = measured_error(data, scale, fp8_format)
        # the held-out fold is 8192 values, over which the rounding error does not average out further
        assert quality.relative_error == pytest.approx(expected, rel=0.02)
        assert quality.sqnr_db == pytest.approx(-20 * math.log10(expected), abs=0.2)


def test_heads_with_a_scale_each_are_judged_at_their_own():
    sizes = torch.tensor([1e-3, 1000.0]).view(1, 2, 1, 1)
    keys = {fold: rows(fold) * sizes for fold in ALL_FOLDS}
    verdict = judged(gqa(keys), granularity="head")["K"]
    quiet, loud = derive_scales(gqa(keys), Scales(granularity="head")).layers[0].k
    assert quiet < 1e-4 < 1 < loud
    assert verdict.scale == loud
    assert verdict.at_scale.subnormal < 0.01
    assert judged(gqa(keys))["K"].at_scale.subnormal > 0.4


def test_rates_weigh_each_head_by_its_values_zeros_included():
    keys = torch.ones(1, 2, 100, 16)
    keys[0, 1] = 0.0
    keys[0, 1, :1] = 1000.0  # one token of the second head clips, the others are zero
    verdict = judged(gqa({0: keys}), granularity="head")["K"]
    assert verdict.at_unit.clipped == pytest.approx(16 / keys.numel())


@pytest.mark.parametrize("heads", [1, 2])
def test_held_out_data_that_the_scale_does_not_hold_shows(heads):
    keys = in_folds(7, heads=heads) | {HELD_OUT_FOLD: rows(1, 100.0, heads=heads)}
    verdict = judged(gqa(keys, in_folds(8, heads=heads)), power_of_two=False)["K"]
    assert verdict.at_scale.clipped == 0
    share = (keys[HELD_OUT_FOLD].abs() / verdict.scale > 448).double().mean().item()
    assert share > 0.5
    assert verdict.held_out.clipped == pytest.approx(share, rel=0.02)
    assert verdict.held_out.relative_error > 0.5


def test_held_out_quality_is_missing_where_nothing_was_held_out():
    stats = gqa(in_folds(9, folds=CALIBRATION_FOLDS), in_folds(10, folds=CALIBRATION_FOLDS))
    for verdict in judge(stats, derive_scales(stats, Scales())):
        assert verdict.held_out is None
        assert verdict.to_json()["held_out"] is None


def test_a_stream_of_zeros_is_flat_and_without_noise():
    zeros = {fold: torch.zeros(1, HEADS, 8, WIDTH) for fold in ALL_FOLDS}
    verdict = judged(gqa(in_folds(11), zeros))["V"]
    assert verdict.verdict == "flat"
    assert verdict.scale == 1.0
    assert verdict.at_scale.relative_error == 0
    assert verdict.at_scale.sqnr_db == math.inf
    assert verdict.held_out is None


def test_json_holds_no_infinity():
    zeros = {0: torch.zeros(1, HEADS, 8, WIDTH)}
    stats = gqa(in_folds(12), zeros)
    data = [verdict.to_json() for verdict in judge(stats, derive_scales(stats, Scales()))]
    text = json.dumps(data, allow_nan=False)
    keys, values = json.loads(text)
    assert values["at_scale"]["sqnr_db"] is None
    assert values["verdict"] == "flat"
    assert keys["at_scale"]["sqnr_db"] > 25
    assert set(keys["held_out"]) == {"relative_error", "sqnr_db", "clipped", "subnormal"}


def test_streams_are_judged_in_model_order():
    layer = {"K": in_folds(13), "V": in_folds(14)}
    stats = measure("gqa", [layer, layer])
    found = [(v.layer, v.stream) for v in judge(stats, derive_scales(stats, Scales()))]
    assert found == [
        (f"model.layers.{index}.self_attn", stream) for index in (0, 1) for stream in ("K", "V")
    ]


def test_scales_of_another_number_of_layers_are_a_mistake():
    stats = gqa(in_folds(15))
    with pytest.raises(ValueError, match="zip"):
        judge(stats, ScaleSet("gqa", "e4m3fn", "tensor", ()))


def mla(latent_size, rope_size):
    return measure(
        "mla",
        [
            {
                "LATENT": in_folds(16, latent_size, heads=1, width=24),
                "ROPE": in_folds(17, rope_size, heads=1, width=8),
            }
        ],
    )


def test_latent_and_rope_part_of_like_size_share_a_scale_without_a_note():
    verdicts = judged(mla(1.0, 30.0))
    assert [v.note for v in verdicts.values()] == ["", ""]
    assert verdicts["LATENT"].scale == verdicts["ROPE"].scale
    assert verdicts["LATENT"].pair_norm is None
    assert verdicts["ROPE"].pair_norm > verdicts["ROPE"].absmax * 0.99


@pytest.mark.parametrize(
    ("latent", "rope", "smaller"), [(1e3, 1e-3, "ROPE"), (1e-3, 1e3, "LATENT")]
)
def test_the_smaller_of_two_streams_that_no_common_scale_can_hold_says_so(latent, rope, smaller):
    verdicts = judged(mla(latent, rope))
    larger = "LATENT" if smaller == "ROPE" else "ROPE"
    assert verdicts[larger].note == ""
    assert verdicts[larger].verdict == "clip"
    small = verdicts[smaller]
    own = measured_error(rows(0, 1.0), rows(0, 1.0).abs().max().item() / 448)
    assert small.note.startswith(
        f"one scale cannot hold latent and rope part: {smaller} has "
        f"{small.at_scale.relative_error:.1%} relative error where a scale of its own would have "
    )
    assert small.note.endswith("; folding gives each its own factor")
    percent = float(small.note.split("would have ")[1].split("%")[0])
    assert percent == pytest.approx(100 * own, rel=0.1)


def test_k_and_v_never_get_the_note_of_mla():
    stats = gqa(in_folds(18, 1e3), in_folds(19, 1e-6))
    coarse = ScaleSet(
        "gqa", "e4m3fn", "tensor", (LayerScales(0, "model.layers.0.self_attn", (4.0,), (4.0,)),)
    )
    assert [verdict.note for verdict in judge(stats, coarse)] == ["", ""]


def growing(seed):
    """Statistics whose largest values grow from fold to fold."""
    keys = {fold: rows(seed + fold, 1.5**fold) for fold in ALL_FOLDS}
    return gqa(keys, in_folds(20))


@pytest.mark.parametrize("options", [Scales(), Scales(estimator="mse"), Scales(granularity="head")])
def test_the_curve_counts_tokens_and_ends_at_zero(options):
    curve = convergence(growing(0), options)
    assert [point.tokens for point in curve] == [TOKENS * count for count in range(1, 8)]
    assert curve[-1].largest_change == curve[-1].median_change == 0
    assert all(point.median_change <= point.largest_change for point in curve)


def test_the_curve_falls_while_the_data_still_changes_the_scales():
    curve = [point.largest_change for point in convergence(growing(0), Scales())]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == pytest.approx(6 * math.log2(1.5), abs=0.5)
    assert curve[-2] > 0.3  # and has not come to rest


def test_the_curve_is_not_rounded_to_powers_of_two():
    assert convergence(growing(0), Scales(power_of_two=True)) == convergence(
        growing(0), Scales(power_of_two=False)
    )


def test_the_curve_of_steady_data_is_flat():
    steady = dict.fromkeys(ALL_FOLDS, rows(0))
    for point in convergence(gqa(steady, steady), Scales()):
        assert point.largest_change == 0


def test_folds_without_data_are_no_points_of_the_curve():
    stats = gqa(in_folds(21, folds=(1, 4, 7)), in_folds(22, folds=(1, 4, 7)))
    assert [point.tokens for point in convergence(stats, Scales())] == [TOKENS, 2 * TOKENS]
    assert convergence(gqa(in_folds(23, folds=(7,)), in_folds(24, folds=(7,))), Scales()) == []


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16), st.randoms(use_true_random=False))
def test_verdicts_and_curve_do_not_depend_on_the_order_of_the_data(seed, rng):
    keys = {fold: rows(seed + fold, 2.0 ** ((seed + fold) % 5)) for fold in ALL_FOLDS}
    shuffled = dict(rng.sample(list(keys.items()), len(keys)))
    by_token = torch.randperm(TOKENS - 1, generator=torch.Generator().manual_seed(seed)) + 1
    by_token = torch.cat([torch.zeros(1, dtype=torch.int64), by_token])  # the first stays first
    shuffled = {fold: data[:, :, by_token] for fold, data in shuffled.items()}
    a, b = gqa(keys, keys), gqa(shuffled, shuffled)
    assert judge(a, derive_scales(a, Scales())) == judge(b, derive_scales(b, Scales()))
    assert convergence(a, Scales()) == convergence(b, Scales())
