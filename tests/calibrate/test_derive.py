"""From statistics to scales: granularity, folds, and the MLA rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.capture import _Accumulator, _Batch
from fp8kv.calibrate.derive import cached_rows, derive_scales
from fp8kv.calibrate.estimators import finish_scale, get_estimator
from fp8kv.calibrate.folds import CALIBRATION_FOLDS, HELD_OUT_FOLD, NUM_FOLDS
from fp8kv.calibrate.histogram import count_magnitudes
from fp8kv.calibrate.rotary import RotaryLayout
from fp8kv.calibrate.statistics import (
    FoldStatistics,
    KVStatistics,
    LayerStatistics,
    Provenance,
)
from fp8kv.kernels.fp8 import FORMATS, get_format
from fp8kv.recipes.errors import ScaleError
from fp8kv.recipes.schema import Scales

ESTIMATORS = ("absmax", "percentile", "mse")


def measure(attention, layers):
    """Return statistics; a layer is ``{stream: {fold: [1, heads, tokens, width]}}``."""
    tokens = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    measured = []
    for index, streams in enumerate(layers):
        found = {}
        for name, by_fold in streams.items():
            first = next(iter(by_fold.values()))
            layout = RotaryLayout(2, "halves") if name in ("K", "ROPE") else None
            accumulator = _Accumulator(first, layout)
            for fold, rows in by_fold.items():
                accumulator.update(rows, _Batch(fold, None))
                tokens[fold] = rows.shape[2]
            found[name] = accumulator.finish()
        measured.append(LayerStatistics(index, f"model.layers.{index}.self_attn", found))
    provenance = Provenance("m", "d", "A", attention, "float32", ("r",), ("t",), "0.1.0")
    return KVStatistics(provenance, tuple(measured), tokens, (tokens > 0).long())


def normal(seed, heads, size, tokens=64, width=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, width, generator=generator) * size


def expected_scale(rows, options):
    """Return the scales of ``[heads, n]`` data, as the estimator alone gives them."""
    magnitudes = rows.abs()[None, :, :, None]
    counts = count_magnitudes(magnitudes)
    data = FoldStatistics(counts.histogram, rows.abs().amax(1), counts.zeros, False)
    estimate = get_estimator(options.estimator, percent=options.percentile)
    scale = estimate(data, get_format(options.fp8_format))
    finished = finish_scale(scale, headroom=options.headroom, power_of_two=options.power_of_two)
    return tuple(finished.tolist())


@pytest.fixture(scope="module")
def gqa():
    return measure(
        "gqa",
        [
            {
                "K": {0: normal(1, 2, 3.0), 4: normal(2, 2, 5.0)},
                "V": {0: normal(3, 2, 0.1), 4: normal(4, 2, 0.2)},
            },
            {
                "K": {0: normal(5, 2, torch.tensor([1.0, 900.0]).view(1, 2, 1, 1))},
                "V": {0: normal(6, 2, 1e-4)},
            },
        ],
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fp8_format", FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_one_scale_per_tensor_is_estimated_over_all_heads_and_folds(
    gqa, estimator, fp8_format, power_of_two
):
    options = Scales(
        estimator=estimator, fp8_format=fp8_format, power_of_two=power_of_two, percentile=99.0
    )
    scales = derive_scales(gqa, options)
    assert (scales.attention, scales.fp8_format, scales.granularity) == (
        "gqa",
        fp8_format,
        "tensor",
    )
    assert [(layer.index, layer.name) for layer in scales.layers] == [
        (0, "model.layers.0.self_attn"),
        (1, "model.layers.1.self_attn"),
    ]
    keys = torch.cat([normal(1, 2, 3.0), normal(2, 2, 5.0)]).reshape(1, -1)
    values = torch.cat([normal(3, 2, 0.1), normal(4, 2, 0.2)]).reshape(1, -1)
    assert scales.layers[0].k == expected_scale(keys, options)
    assert scales.layers[0].v == expected_scale(values, options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_scale_per_head_is_that_of_the_head_alone(gqa, estimator):
    options = Scales(estimator=estimator, granularity="head", power_of_two=False)
    scales = derive_scales(gqa, options)
    assert scales.granularity == "head"
    keys = torch.cat([normal(1, 2, 3.0), normal(2, 2, 5.0)]).transpose(0, 1).reshape(2, -1)
    assert scales.layers[0].k == expected_scale(keys, options)
    assert scales.layers[0].k[0] != scales.layers[0].k[1]
    quiet, loud = scales.layers[1].k
    assert loud / quiet == pytest.approx(900, rel=0.5)


def test_the_largest_head_decides_the_scale_of_the_tensor(gqa):
    by_head = derive_scales(gqa, Scales(granularity="head"))
    by_tensor = derive_scales(gqa, Scales(granularity="tensor"))
    for heads, tensor in zip(by_head.layers, by_tensor.layers, strict=True):
        assert tensor.k == (max(heads.k),)
        assert tensor.v == (max(heads.v),)


def mla_statistics(latent, rope):
    return measure("mla", [{"LATENT": {0: latent}, "ROPE": {0: rope}}])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**16),
    st.integers(-12, 12),
    st.sampled_from(ESTIMATORS),
    st.sampled_from([50.0, 99.0]),
    st.booleans(),
)
def test_an_mla_layer_has_one_scale_over_latent_and_rope_part_together(
    seed, octaves, estimator, percent, power_of_two
):
    latent = normal(seed, 1, 1.0, width=24)
    rope = normal(seed + 1, 1, 2.0**octaves, width=8)
    options = Scales(estimator=estimator, percentile=percent, power_of_two=power_of_two)
    (layer,) = derive_scales(mla_statistics(latent, rope), options).layers
    both = torch.cat([latent.flatten(), rope.flatten()])[None]
    assert layer.k == layer.v == expected_scale(both, options)


@pytest.mark.parametrize(("latent_size", "rope_size"), [(1.0, 100.0), (100.0, 1.0)])
def test_the_larger_of_latent_and_rope_part_fits(latent_size, rope_size):
    latent, rope = normal(1, 1, latent_size), normal(2, 1, rope_size)
    (layer,) = derive_scales(mla_statistics(latent, rope), Scales()).layers
    largest = max(latent.abs().max().item(), rope.abs().max().item())
    assert largest <= layer.k[0] * 448 <= 2 * largest
    assert layer.v == layer.k


def test_a_scale_per_head_is_refused_for_mla():
    stats = mla_statistics(normal(1, 1, 1.0), normal(2, 1, 1.0))
    with pytest.raises(ScaleError) as caught:
        derive_scales(stats, Scales(granularity="head"))
    assert str(caught.value) == (
        "granularity 'head' does not exist for MLA, which caches one latent row per token: "
        "use 'tensor'"
    )


def test_the_held_out_fold_chooses_nothing():
    rows = {fold: normal(fold, 2, 1.0) for fold in CALIBRATION_FOLDS}
    without = measure("gqa", [{"K": rows, "V": rows}])
    loud = rows | {HELD_OUT_FOLD: normal(9, 2, 1e4)}
    with_loud = measure("gqa", [{"K": loud, "V": loud}])
    for estimator in ESTIMATORS:
        options = Scales(estimator=estimator)
        assert derive_scales(with_loud, options) == derive_scales(without, options)


def test_the_folds_to_choose_on_may_be_named():
    rows = {0: normal(0, 1, 1.0), 1: normal(1, 1, 64.0), HELD_OUT_FOLD: normal(2, 1, 4096.0)}
    stats = measure("gqa", [{"K": rows, "V": rows}])
    chosen = [derive_scales(stats, Scales(), folds).layers[0].k[0] for folds in ([0], [0, 1])]
    everything = derive_scales(stats, Scales(), range(NUM_FOLDS)).layers[0].k[0]
    assert chosen[0] < chosen[1] < everything
    assert derive_scales(stats, Scales()).layers[0].k[0] == chosen[1]


def test_folds_without_data_are_refused_by_number():
    stats = measure("gqa", [{"K": {7: normal(0, 1, 1.0)}, "V": {7: normal(1, 1, 1.0)}}])
    with pytest.raises(ScaleError) as caught:
        derive_scales(stats, Scales())
    assert str(caught.value) == (
        "the statistics hold no tokens in folds [0, 1, 2, 3, 4, 5, 6]: calibrate on more data"
    )
    with pytest.raises(ScaleError, match=r"no tokens in folds \[2\]"):
        derive_scales(stats, Scales(), (2,))


def test_headroom_widens_every_scale(gqa):
    plain = derive_scales(gqa, Scales())
    wide = derive_scales(gqa, Scales(headroom=4.0))
    for narrow, broad in zip(plain.layers, wide.layers, strict=True):
        assert broad.k == (4 * narrow.k[0],)
        assert broad.v == (4 * narrow.v[0],)


def test_a_stream_of_zeros_gets_scale_one():
    stats = measure("gqa", [{"K": {0: normal(0, 2, 1.0)}, "V": {0: torch.zeros(1, 2, 4, 8)}}])
    for granularity in ("tensor", "head"):
        (layer,) = derive_scales(stats, Scales(granularity=granularity)).layers
        assert set(layer.v) == {1.0}


def test_what_shares_a_scale(gqa):
    keys, values = cached_rows(gqa.layers[0], (0, 4), "head")
    assert keys.histogram.shape[0] == values.histogram.shape[0] == 2
    keys, values = cached_rows(gqa.layers[0], (0, 4), "tensor")
    assert keys.histogram.shape[0] == 1
    assert int(keys.histogram.sum()) == 2 * 2 * 64 * 8
    row, same_row = cached_rows(
        mla_statistics(normal(1, 1, 1.0, width=24), normal(2, 1, 1.0)).layers[0], (0,), "tensor"
    )
    assert row is same_row
    assert int(row.histogram.sum()) == 64 * (24 + 8)
