"""From statistics to scales: the only place that knows about granularity and about the MLA rule."""

from __future__ import annotations

from collections.abc import Sequence

from fp8kv.calibrate.estimators import finish_scale, get_estimator
from fp8kv.calibrate.folds import CALIBRATION_FOLDS
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.calibrate.statistics import FoldStatistics, KVStatistics, LayerStatistics
from fp8kv.kernels.fp8 import get_format
from fp8kv.recipes.errors import ScaleError
from fp8kv.recipes.schema import Scales


def derive_scales(
    stats: KVStatistics, options: Scales, folds: Sequence[int] = CALIBRATION_FOLDS
) -> ScaleSet:
    """Choose the scales of every layer.

    An MLA layer caches one row, latent and rope part, of which V is a view: its one scale is estimated over both
    streams together, and ``v`` equals ``k``.

    Args:
        stats: merged statistics.
        options: estimator, headroom, rounding, granularity and format.
        folds: the folds to choose on; the held-out fold is not among them by default.

    Raises:
        ScaleError: granularity ``head`` was asked of an MLA model, or the folds hold no data.
    """
    mla = stats.provenance.attention == "mla"
    if mla and options.granularity == "head":
        raise ScaleError(
            "granularity 'head' does not exist for MLA, which caches one latent row per token: use 'tensor'"
        )
    if int(stats.tokens[list(folds)].sum()) == 0:
        raise ScaleError(
            f"the statistics hold no tokens in folds {list(folds)}: calibrate on more data"
        )
    return ScaleSet(
        attention=stats.provenance.attention,
        fp8_format=options.fp8_format,
        granularity=options.granularity,
        layers=tuple(_layer_scales(layer, options, folds) for layer in stats.layers),
    )


def cached_rows(
    layer: LayerStatistics, folds: Sequence[int], granularity: str
) -> tuple[FoldStatistics, FoldStatistics]:
    """Return what shares a K scale and what shares a V scale; for MLA both are the one row of both streams."""
    selected = {name: stream.select(tuple(folds)) for name, stream in layer.streams.items()}
    if "LATENT" in selected:
        row = selected["LATENT"].over_heads().union(selected["ROPE"].over_heads())
        return row, row
    keys, values = selected["K"], selected["V"]
    return (keys, values) if granularity == "head" else (keys.over_heads(), values.over_heads())


def _layer_scales(layer: LayerStatistics, options: Scales, folds: Sequence[int]) -> LayerScales:
    fmt = get_format(options.fp8_format)
    estimate = get_estimator(options.estimator, percent=options.percentile)
    keys, values = cached_rows(layer, folds, options.granularity)

    def choose(row: FoldStatistics) -> tuple[float, ...]:
        scale = finish_scale(
            estimate(row, fmt), headroom=options.headroom, power_of_two=options.power_of_two
        )
        return tuple(scale.tolist())

    k = choose(keys)
    return LayerScales(layer.index, layer.name, k=k, v=k if values is keys else choose(values))
