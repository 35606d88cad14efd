"""Refuse, before anything is written, what no engine could use or what would do harm."""

from __future__ import annotations

from collections.abc import Sequence

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.formats.kv_names import is_kv_scale_name
from fp8kv.calibrate.formats.target_table import EffectRule, Target, load_table
from fp8kv.calibrate.formats.targets import (
    base_method,
    case_of,
    check_target,
    effect_rule,
    load_targets,
)
from fp8kv.calibrate.overlay.manifest import MANIFEST_FILE, SCALES_FILE
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.recipes.errors import Fp8kvError, OutputError, ScaleError, UnsupportedModelError


def check_source(checkpoint: Checkpoint, facts: ModelFacts) -> None:
    """Refuse a checkpoint that cannot carry static KV scales, or that carries some already.

    Raises:
        UnsupportedModelError: its attention takes no static scales, or no engine gives its quantisation any.
        OutputError: it holds scale tensors.
    """
    where = checkpoint.source
    if not facts.static_scales:
        raise UnsupportedModelError(
            f"{where} ({facts.architecture}) takes no KV scales: {facts.reason}"
        )
    method = base_method(facts)
    base = load_table().bases.get(method)
    if base is None:
        raise UnsupportedModelError(
            f"{where} has the quant_method {method!r}, of which fp8kv does not know what engines do with KV scales; "
            "start from the BF16, FP8 or compressed-tensors form of the model"
        )
    if not base.writable:
        raise UnsupportedModelError(f"{where} has the quant_method {method!r}: {base.reason}")
    if method == "modelopt" and "quantization" in facts.quantization:
        raise UnsupportedModelError(
            f"{where} nests ModelOpt's keys under quantization_config.quantization, a layout that fp8kv has not seen "
            "an engine load; start from the BF16 or FP8 form of the model"
        )
    _check_no_scales(checkpoint)


def check_scales(facts: ModelFacts, scales: ScaleSet) -> None:
    """Refuse scales that are not exactly those of the model's layers.

    Raises:
        ScaleError: other layers, another attention kind, or another number of heads.
    """
    if scales.attention != facts.attention:
        raise ScaleError(
            f"the scales are for {scales.attention} attention and the checkpoint has {facts.attention}; "
            "calibrate this checkpoint"
        )
    expected = [layer.name for layer in facts.layers]
    given = [layer.name for layer in scales.layers]
    for problem, names in (
        ("lacks", [name for name in expected if name not in set(given)]),
        ("has too much:", [name for name in given if name not in set(expected)]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ScaleError(
                f"the scale set {problem} {names[0]}{more}, compared with the {len(expected)} layers of the "
                "checkpoint that own a KV cache; calibrate this checkpoint"
            )
    if scales.granularity == "head" and facts.num_kv_heads is not None:
        for layer in scales.layers:
            if len(layer.k) != facts.num_kv_heads:
                raise ScaleError(
                    f"{layer.name} has {len(layer.k)} scales for {facts.num_kv_heads} KV heads; "
                    "calibrate this checkpoint"
                )


def check_targets(facts: ModelFacts, scales: ScaleSet, targets: Sequence[Target]) -> None:
    """Refuse targets that break on the result, and a choice of targets of which none would use it.

    An MLA checkpoint may be written though all targets ignore its scales: the names are harmless there, and fp8kv's
    own runtime reads them.

    Raises:
        ScaleError: granularity or FP8 format are at fault.
        UnsupportedModelError: the model is.
    """
    case = case_of(facts, scales.granularity, scales.fp8_format)
    effects = [
        check_target(target, facts, scales.granularity, scales.fp8_format) for target in targets
    ]
    rules = [effect_rule(target, case) for target in targets]
    for effect, rule in zip(effects, rules, strict=True):
        if effect.loads == "breaks":
            raise _culprit(rule)(f"target {effect.target}: {effect.reason}")
    if facts.attention == "gqa" and not any(effect.loads == "loads" for effect in effects):
        others = [
            name
            for name, target in load_targets().items()
            if effect_rule(target, case).effect == "loads"
        ]
        remedy = f"; targets that do: {', '.join(others)}" if others else ""
        reasons = "; ".join(effect.reason for effect in effects)
        raise _culprit(rules[0])(f"no target would use the scales of this model: {reasons}{remedy}")


def _check_no_scales(checkpoint: Checkpoint) -> None:
    names = [name for name in checkpoint.weight_map if is_kv_scale_name(name)]
    if (checkpoint.path / MANIFEST_FILE).exists():
        raise OutputError(
            f"{checkpoint.source} was written by fp8kv and holds {len(names)} KV scale tensors"
            f"{f', the first is {names[0]}' if names else ''}; "
            "run `fp8kv strip` on it, or start from its source"
        )
    if names:
        raise OutputError(
            f"{checkpoint.source} already carries {len(names)} KV scale tensors, the first is {names[0]}, not written "
            "by fp8kv; two calibrations cannot be mixed, so start from a checkpoint without (`fp8kv inspect` lists them)"
        )
    if (checkpoint.path / SCALES_FILE).exists():
        raise OutputError(
            f"{checkpoint.path / SCALES_FILE} exists, though no index names it; remove it, engines may read it"
        )


def _culprit(rule: EffectRule) -> type[Fp8kvError]:
    about_scales = rule.when.granularity is not None or rule.when.fp8_format is not None
    return ScaleError if about_scales else UnsupportedModelError
