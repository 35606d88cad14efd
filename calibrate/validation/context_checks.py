"""Checks of the scales against the rest of the checkpoint: engines, index, base shards, statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fp8kv.calibrate.formats.target_table import Target, load_table
from fp8kv.calibrate.formats.targets import (
    case_of,
    check_target,
    config_lacks,
    load_targets,
    names_rule,
)
from fp8kv.calibrate.overlay.manifest import SCALES_FILE
from fp8kv.calibrate.validation.scale_checks import Check, Subject, judge, show_scale
from fp8kv.kernels.fp8 import get_format

CLIP_TOLERANCE = 1.001
"""How far above the format's range the largest calibrated value may lie: a scale is rounded, and so is the check."""

WASTE_FACTOR = 64.0
"""A scale this many times larger than the data asks for pushes small values into the subnormals for nothing."""


def plausibility(
    scales: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    absmax_by_layer: Mapping[str, tuple[float, float]],
    *,
    attention: str = "gqa",
    fp8_format: str = "e4m3fn",
    estimator: str | None = "absmax",
) -> list[str]:
    """Compare scales with the largest magnitudes that calibration saw.

    Args:
        scales: attention module -> its K scales and its V scales, one or one per head.
        absmax_by_layer: attention module -> largest magnitude of K and of V.
        attention: of ``mla`` the larger of both magnitudes counts, since one row holds both streams.
        fp8_format: a key of :data:`fp8kv.kernels.fp8.FORMATS`.
        estimator: only ``absmax`` promises that nothing clips; others clip on purpose.

    Returns:
        One sentence for each scale that clips the calibration data, or is more than :data:`WASTE_FACTOR` times
        too large; and for each layer whose magnitudes are unknown.
    """
    limit = get_format(fp8_format).max
    problems = []
    for layer, streams in scales.items():
        if layer not in absmax_by_layer:
            problems.append(f"the statistics have no layer {layer}")
            continue
        pair = absmax_by_layer[layer]
        maxima = (max(pair), max(pair)) if attention == "mla" else pair
        for stream, values, absmax in zip("kv", streams, maxima, strict=True):
            # Maxima are known per layer, so of several heads the largest scale is the one to hold it.
            scale = max(values)
            if not scale > 0 or absmax <= 0:
                continue
            if estimator == "absmax" and absmax / scale > limit * CLIP_TOLERANCE:
                problems.append(
                    f"{stream}_scale {scale:g} of {layer} clips: the calibrated maximum {absmax:g} is "
                    f"{absmax / scale:g} in the cache, above {limit:g}"
                )
            if scale > WASTE_FACTOR * absmax / limit:
                problems.append(
                    f"{stream}_scale {scale:g} of {layer} wastes range: the calibrated maximum {absmax:g} is only "
                    f"{absmax / scale:g} in the cache, of {limit:g}"
                )
    return problems


def check_targets(subject: Subject) -> Iterator[Check]:
    """Names and config are what each target needs; a target that is known to ignore them is named."""
    for target in _targets(subject):
        name = f"target {target.name}"
        fp8_format = subject.manifest.fp8_format if subject.manifest else "e4m3fn"
        effect = check_target(target, subject.facts, subject.granularity, fp8_format)
        problems = _harmful(subject, target)
        if effect.loads == "breaks":
            problems.append(effect.reason)
        elif effect.loads == "loads":
            problems += _not_loadable(subject, target)
        yield judge(name, problems, f"{effect.loads}: {effect.reason}")


def check_index(subject: Subject) -> Iterator[Check]:
    """The index names exactly the tensors that its shards hold."""
    listed = subject.checkpoint.weight_map
    problems = [
        f"{name} is in {shard} but not in the index, so readers that follow the index miss it"
        for shard, header in subject.checkpoint.shards.items()
        for name in header.tensors
        if listed.get(name) != shard
    ]
    yield judge(
        "index", problems, f"{len(listed)} tensors in {len(subject.checkpoint.shards)} shards"
    )


def check_base_untouched(subject: Subject) -> Iterator[Check]:
    """The source's shards have the size and the header that they had when fp8kv read them."""
    if subject.manifest is None:
        return
    shards = subject.checkpoint.shards
    problems = [f"{name} is missing" for name in subject.manifest.shards if name not in shards]
    problems += [
        f"{name} was not there when fp8kv wrote this checkpoint"
        for name in shards
        if name not in subject.manifest.shards and name != SCALES_FILE
    ]
    for name, recorded in subject.manifest.shards.items():
        header = shards.get(name)
        if header and (header.file_size, header.sha256) != (recorded.size, recorded.header_sha256):
            problems.append(f"{name} has another size or header than when fp8kv read it")
    yield judge(
        "base-untouched", problems, f"{len(subject.manifest.shards)} shards, sizes and headers"
    )


def check_plausible(subject: Subject) -> Iterator[Check]:
    """The scales fit the magnitudes that calibration saw."""
    if subject.absmax is None:
        return
    manifest = subject.manifest
    scales = {}
    for layer in dict.fromkeys(found.layer for found in subject.scales):
        k, v = subject.of(layer, "k"), subject.of(layer, "v")
        if k and v:
            scales[layer] = (k[0].value.tolist(), v[0].value.tolist())
    problems = plausibility(
        scales,
        subject.absmax,
        attention=subject.facts.attention,
        fp8_format=manifest.fp8_format if manifest else "e4m3fn",
        estimator=manifest.estimator if manifest else None,
    )
    yield judge("plausible", problems, f"{len(scales)} layers against the statistics")


def _targets(subject: Subject) -> list[Target]:
    """Return what the checkpoint was written for; for a foreign one, all engines that could be meant."""
    targets = load_targets()
    if subject.manifest is not None:
        return [targets[name] for name in subject.manifest.targets if name in targets]
    is_modelopt = subject.facts.quant_method == "modelopt"
    return [target for name, target in targets.items() if name != "modelopt" or is_modelopt]


def _not_loadable(subject: Subject, target: Target) -> list[str]:
    case = case_of(subject.facts, subject.granularity)
    spellings = [load_table().spellings[name] for name in names_rule(target, case).load]
    problems = []
    for layer in subject.facts.layers:
        for stream in "kv":
            names = [spelling.name(layer.name, stream) for spelling in spellings]
            if not any(name in subject.checkpoint.weight_map for name in names):
                problems.append(f"{target.engine} {target.version} finds no {' or '.join(names)}")
    lacking = config_lacks(target, case, subject.facts.quantization)
    if lacking:
        problems.append(
            f"{target.engine} {target.version} needs other values in config.json under quantization_config: "
            f"{', '.join(lacking)}"
        )
    return problems


def _harmful(subject: Subject, target: Target) -> list[str]:
    rule = names_rule(target, case_of(subject.facts, subject.granularity))
    spellings = [load_table().spellings[name] for name in rule.harmful]
    harmful = {
        spelling.name(layer.name, stream)
        for layer in subject.facts.layers
        for spelling in spellings
        for stream in "kv"
    }
    return [
        f"{target.engine} {target.version} applies {found.tensor} = {show_scale(found)} when it reads the cache and not "
        "when it writes it; only 1 is safe under this name"
        for found in subject.scales
        if found.tensor in harmful and not (found.value == 1).all()
    ]
