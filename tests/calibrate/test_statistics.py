"""Statistics merge: any split and any order of the data gives bit-identical statistics."""

import dataclasses
import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.capture import _Accumulator, _Batch, _valid_positions
from fp8kv.calibrate.data.batches import TokenBatch
from fp8kv.calibrate.folds import CALIBRATION_FOLDS, HELD_OUT_FOLD, NUM_FOLDS
from fp8kv.calibrate.histogram import NUM_BINS, count_magnitudes
from fp8kv.calibrate.rotary import RotaryLayout
from fp8kv.calibrate.statistics import (
    KVStatistics,
    LayerStatistics,
    Provenance,
    StreamStatistics,
    absmax_by_layer,
    merge_layers,
)
from fp8kv.recipes.errors import StatisticsError

LAYOUT = RotaryLayout(4, "halves")
HEADS, WIDTH = 2, 6

PROVENANCE = Provenance(
    model="a/model",
    model_digest="1" * 64,
    architecture="LlamaForCausalLM",
    attention="gqa",
    dtype="float32",
    recipe_digests=("a" * 64,),
    data_digests=("0" * 64,),
    fp8kv="0.1.0",
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one sample caches: ``[1, HEADS, tokens, WIDTH]`` of K and of V."""

    fold: int
    digest: str
    keys: torch.Tensor
    values: torch.Tensor


def make_sample(seed, dtype=torch.float32):
    """Return a sample with zeros, tiny and huge values; the seed decides all of it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 1 + seed % 4

    def tensor():
        shape = (1, HEADS, tokens, WIDTH)
        largest = 12 if dtype == torch.float16 else 30
        exponents = torch.randint(-40, largest, shape, generator=generator)
        zero = torch.rand(shape, generator=generator) < 0.1
        values = torch.randn(shape, generator=generator) * torch.exp2(exponents.float())
        return values.masked_fill(zero, 0).to(dtype)

    return Sample(seed % NUM_FOLDS, f"{seed:064x}", tensor(), tensor())


def measure(samples, **changes):
    """Accumulate as the capture does, sample by sample."""
    provenance = dataclasses.replace(
        PROVENANCE, data_digests=tuple(sorted(sample.digest for sample in samples)), **changes
    )
    like = make_sample(0) if not samples else samples[0]
    keys, values = _Accumulator(like.keys, LAYOUT), _Accumulator(like.values, None)
    tokens = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    count = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    for sample in samples:
        batch = _Batch(sample.fold, None)
        keys.update(sample.keys, batch)
        values.update(sample.values, batch)
        tokens[sample.fold] += sample.keys.shape[2]
        count[sample.fold] += 1
    streams = {"K": keys.finish(), "V": values.finish()}
    layer = LayerStatistics(3, "model.layers.3.self_attn", streams)
    return KVStatistics(provenance, (layer,), tokens, count)


def identical(a, b):
    """Tell whether two statistics, or parts of them, are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if dataclasses.is_dataclass(a):
        return all(
            identical(getattr(a, field.name), getattr(b, field.name))
            for field in dataclasses.fields(a)
        )
    return a == b


seeds = st.lists(st.integers(0, 2**20), min_size=1, max_size=8, unique=True)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(deadline=None, max_examples=50)
@given(seeds, dtypes, st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_split_and_order_of_the_data_merges_to_the_same_statistics(
    seeds, dtype, num_parts, rng
):
    samples = [make_sample(seed, dtype) for seed in seeds]
    whole = measure(samples)
    shuffled = rng.sample(samples, len(samples))
    parts = [shuffled[start::num_parts] for start in range(num_parts)]
    measured = [measure(part) for part in parts if part]
    while len(measured) > 1:  # merge any two, in either order, until one is left
        rng.shuffle(measured)
        measured.append(measured.pop().merge(measured.pop()))
    assert identical(measured[0], whole)


@settings(deadline=None, max_examples=50)
@given(seeds.filter(lambda seeds: len(seeds) >= 3))
def test_merging_is_commutative_and_associative(seeds):
    a, b, c = (
        measure([make_sample(seed) for seed in seeds[start::3]], model=model, fp8kv=version)
        for start, model, version in ((0, "b", "0.1.0"), (1, "a", "0.3.0"), (2, "c", "0.2.0"))
    )
    assert identical(a.merge(b), b.merge(a))
    assert identical(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert a.merge(b).provenance.model == "a"
    assert a.merge(b).provenance.fp8kv == "0.3.0"


@settings(deadline=None, max_examples=50)
@given(seeds, dtypes, st.sampled_from([0.0, 65504.0, float("nan"), float("inf")]))
def test_a_padded_batch_counts_as_its_samples_one_by_one_whatever_the_padding_holds(
    seeds, dtype, padding
):
    samples = [make_sample(seed, dtype) for seed in seeds]
    lengths = torch.tensor([sample.keys.shape[2] for sample in samples])
    rows = torch.full((len(samples), HEADS, int(lengths.max()), WIDTH), padding, dtype=dtype)
    for row, sample in zip(rows, samples, strict=True):
        row[:, : sample.keys.shape[2]] = sample.keys[0]
    token_ids = torch.zeros(len(samples), rows.shape[2], dtype=torch.int64)
    valid = _valid_positions(TokenBatch(token_ids, lengths, 2), torch.device("cpu"))
    batched, one_by_one = _Accumulator(rows, LAYOUT), _Accumulator(rows, LAYOUT)
    batched.update(rows, _Batch(2, valid))
    for sample in samples:
        one_by_one.update(sample.keys, _Batch(2, None))
    assert identical(batched.finish(), one_by_one.finish())


def test_the_neutral_element_changes_nothing():
    stream = measure([make_sample(1), make_sample(7)]).layers[0].streams["K"]
    empty = StreamStatistics.empty(HEADS, WIDTH, has_pairs=True, bfloat16=False)
    assert identical(stream.merge(empty), stream)
    assert identical(empty.merge(stream), stream)
    assert StreamStatistics.empty(1, 3, has_pairs=False, bfloat16=True).pair_norm is None


def test_what_is_kept_is_what_the_data_says():
    samples = [make_sample(seed) for seed in range(8, 28)]
    stream = measure(samples).layers[0].streams["K"]
    for fold in range(NUM_FOLDS):
        rows = torch.cat([s.keys for s in samples if s.fold == fold], dim=2)
        assert torch.equal(stream.absmax[fold], rows.abs().amax(dim=(0, 2, 3)))
        counts = count_magnitudes(rows.abs())
        assert torch.equal(stream.histogram[fold], counts.histogram)
        assert torch.equal(stream.zeros[fold], (rows == 0).sum(dim=(0, 2, 3)))
    chosen = [s.keys for s in samples if s.fold != HELD_OUT_FOLD]
    rows, first = torch.cat(chosen, dim=2), torch.cat([keys[:, :, :1] for keys in chosen], dim=2)
    assert torch.equal(stream.channel_absmax, rows.abs().amax(dim=(0, 2)))
    assert torch.equal(stream.first_absmax, first.abs().amax(dim=(0, 2, 3)))
    assert torch.equal(stream.first_histogram, count_magnitudes(first.abs()).histogram)
    assert torch.equal(stream.pair_norm, LAYOUT.pair_norms(rows))
    assert int(stream.nonfinite.sum()) == 0
    assert (stream.num_heads, stream.width) == (HEADS, WIDTH)


def test_the_held_out_fold_touches_nothing_that_scales_are_chosen_from():
    held_out = make_sample(HELD_OUT_FOLD)
    stream = measure([held_out]).layers[0].streams["K"]
    assert stream.absmax[HELD_OUT_FOLD].amax() > 0
    for field in ("channel_absmax", "first_histogram", "first_absmax", "pair_norm"):
        assert int(getattr(stream, field).count_nonzero()) == 0, field
    assert stream.absmax[list(CALIBRATION_FOLDS)].amax() == 0


def test_values_that_are_not_finite_are_counted_by_head():
    rows = torch.tensor([1.0, float("nan"), float("inf"), -1.0]).view(1, 2, 1, 2)
    accumulator = _Accumulator(rows, None)
    accumulator.update(rows, _Batch(0, None))
    accumulator.update(rows, _Batch(5, None))
    stream = accumulator.finish()
    assert stream.nonfinite.sum(0).tolist() == [2, 2]
    assert stream.nonfinite[5].tolist() == [1, 1]
    assert stream.merge(stream).nonfinite.sum(0).tolist() == [4, 4]


def test_a_statistic_that_was_handed_out_does_not_change_while_counting_goes_on():
    sample = make_sample(3)
    accumulator = _Accumulator(sample.keys, LAYOUT)
    accumulator.update(sample.keys, _Batch(0, None))
    before = accumulator.finish()
    copy = dataclasses.replace(before, histogram=before.histogram.clone())
    accumulator.update(sample.keys * 2, _Batch(0, None))
    assert identical(before, copy)
    assert not identical(accumulator.finish(), before)


def test_selecting_folds_adds_their_counts_and_takes_the_largest_maximum():
    samples = [make_sample(seed) for seed in (0, 1, 2, 8, 9)]
    stream = measure(samples).layers[0].streams["V"]
    chosen = stream.select((0, 2))
    rows = torch.cat([s.values for s in samples if s.fold in (0, 2)], dim=2)
    assert torch.equal(chosen.histogram, count_magnitudes(rows.abs()).histogram)
    assert torch.equal(chosen.absmax, rows.abs().amax(dim=(0, 2, 3)))
    assert torch.equal(chosen.zeros, (rows == 0).sum(dim=(0, 2, 3)))
    assert not chosen.bfloat16


def test_heads_taken_together_count_as_one():
    sample = make_sample(2)
    chosen = measure([sample]).layers[0].streams["V"].select((2,)).over_heads()
    everything = sample.values.reshape(1, 1, -1, 1)
    assert torch.equal(chosen.histogram, count_magnitudes(everything.abs()).histogram)
    assert chosen.absmax.tolist() == [everything.abs().max().item()]
    assert chosen.zeros.tolist() == [int((everything == 0).sum())]


def test_a_union_counts_both_streams():
    sample = make_sample(6)
    streams = measure([sample]).layers[0].streams
    union = streams["K"].select((6,)).union(streams["V"].select((6,)))
    both = torch.cat([sample.keys, sample.values], dim=2)
    assert torch.equal(union.histogram, count_magnitudes(both.abs()).histogram)
    assert torch.equal(union.absmax, both.abs().amax(dim=(0, 2, 3)))
    assert torch.equal(union.zeros, (both == 0).sum(dim=(0, 2, 3)))


@pytest.mark.parametrize(("a", "b", "both"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_data_counts_as_bfloat16_only_where_all_of_it_is(a, b, both):
    mine = StreamStatistics.empty(1, 2, has_pairs=False, bfloat16=bool(a))
    its = StreamStatistics.empty(1, 2, has_pairs=False, bfloat16=bool(b))
    assert mine.merge(its).bfloat16 is both
    assert mine.select((0,)).union(its.select((0,))).bfloat16 is both
    assert mine.select((0,)).over_heads().bfloat16 is bool(a)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "model_digest",
            "2" * 64,
            f"these statistics differ in model_digest ({'1' * 64} and {'2' * 64}) and cannot be merged: "
            "measure both on the same checkpoint",
        ),
        (
            "dtype",
            "bfloat16",
            "these statistics differ in dtype (float32 and bfloat16) and cannot be merged: "
            "measure both in the same --dtype",
        ),
        (
            "attention",
            "mla",
            "these statistics differ in attention (gqa and mla) and cannot be merged: "
            "measure both on the same checkpoint",
        ),
    ],
)
def test_statistics_of_something_else_are_refused(field, value, message):
    mine, its = measure([make_sample(1)]), measure([make_sample(2)], **{field: value})
    with pytest.raises(StatisticsError) as caught:
        mine.merge(its)
    assert str(caught.value) == message


def test_data_that_would_count_twice_is_refused_by_its_digest():
    mine, its = measure([make_sample(0xABC), make_sample(2)]), measure([make_sample(0xABC)])
    with pytest.raises(StatisticsError) as caught:
        mine.merge(its)
    assert str(caught.value) == (
        "both statistics hold the data set 0000000000000000, which would count twice: "
        "merge statistics of different data"
    )
    with pytest.raises(StatisticsError, match="would count twice"):
        mine.merge(mine)


def altered(stats, change):
    layer = stats.layers[0]
    return dataclasses.replace(stats, layers=change(layer))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: (),
        lambda layer: (layer, dataclasses.replace(layer, name="model.layers.4.self_attn")),
        lambda layer: (dataclasses.replace(layer, name="model.layers.4.self_attn"),),
        lambda layer: (dataclasses.replace(layer, streams={"K": layer.streams["K"]}),),
        lambda layer: (
            dataclasses.replace(
                layer,
                streams={
                    name: StreamStatistics.empty(HEADS, 4, has_pairs=name == "K", bfloat16=False)
                    for name in ("K", "V")
                },
            ),
        ),
    ],
    ids=["no layer", "more layers", "another layer", "a stream less", "another width"],
)
def test_statistics_of_another_shape_are_refused(change):
    mine, its = measure([make_sample(1)]), altered(measure([make_sample(2)]), change)
    with pytest.raises(StatisticsError, match="differ in layers, streams, heads or widths"):
        mine.merge(its)


def test_merging_layers_keeps_index_name_and_the_order_of_streams():
    a, b = measure([make_sample(1)]).layers, measure([make_sample(2)]).layers
    (merged,) = merge_layers(a, b)
    assert (merged.index, merged.name) == (3, "model.layers.3.self_attn")
    assert list(merged.streams) == ["K", "V"]


def test_recipes_are_united_and_kept_sorted():
    a = measure([make_sample(1)], recipe_digests=("c", "d"))
    b = measure([make_sample(2)], recipe_digests=("a", "c"))
    assert a.merge(b).provenance.recipe_digests == ("a", "c", "d")


def test_absmax_by_layer_of_gqa_is_that_of_k_and_of_v():
    samples = [make_sample(seed) for seed in (1, 2, HELD_OUT_FOLD)]
    stats = measure(samples)
    largest = {
        name: max(getattr(s, name).abs().max().item() for s in samples[:2])
        for name in ("keys", "values")
    }
    assert absmax_by_layer(stats) == {
        "model.layers.3.self_attn": (largest["keys"], largest["values"])
    }


@pytest.mark.parametrize("larger", ["LATENT", "ROPE"])
def test_absmax_by_layer_of_mla_is_that_of_the_whole_row_twice(larger):
    sizes = {"LATENT": 1.0, "ROPE": 1.0, larger: 5.0}
    streams = {}
    for name, size in sizes.items():
        accumulator = _Accumulator(rows := torch.full((1, 1, 2, 4), -size), None)
        accumulator.update(rows, _Batch(0, None))
        streams[name] = accumulator.finish()
    stats = dataclasses.replace(
        measure([make_sample(1)]), layers=(LayerStatistics(0, "layer", streams),)
    )
    assert absmax_by_layer(stats) == {"layer": (5.0, 5.0)}


def test_counts_go_on_past_32_bits():
    stream = StreamStatistics.empty(1, 1, has_pairs=False, bfloat16=True)
    full = dataclasses.replace(
        stream, histogram=torch.full((NUM_FOLDS, 1, NUM_BINS), 2**31 - 1, dtype=torch.int64)
    )
    merged = functools.reduce(StreamStatistics.merge, [full] * 4)
    assert int(merged.histogram.max()) == 4 * (2**31 - 1)


def test_a_shuffled_list_of_statistics_folds_to_the_same_result():
    parts = [measure([make_sample(seed)]) for seed in range(20, 40)]
    forward = functools.reduce(KVStatistics.merge, parts)
    random.Random(0).shuffle(parts)
    assert identical(functools.reduce(KVStatistics.merge, parts), forward)
