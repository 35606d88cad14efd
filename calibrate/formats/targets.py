"""What serving engines do with KV scales in a checkpoint.

The writer, the validator and the printed serve commands ask the same table (``targets.yaml``), so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.formats.target_table import (
    Case,
    ConfigRule,
    Effect,
    EffectRule,
    FilesRule,
    ForbidRule,
    NamesRule,
    Target,
    When,
    load_table,
)
from fp8kv.recipes.errors import OutputError

UNQUANTISED = "none"


@dataclass(frozen=True)
class TargetEffect:
    """What a target does with the scales of one checkpoint.

    Attributes:
        target: name of the target.
        loads: ``loads``, ``ignored`` or ``breaks``.
        reason: one sentence that begins with the engine and its version.
        serve: the command that serves the result; ``{model}`` stands for the directory.
        source: where the fact comes from, and whether it was run or read.
    """

    target: str
    loads: Effect
    reason: str
    serve: str
    source: str


def load_targets() -> Mapping[str, Target]:
    """Return all targets by name."""
    return load_table().targets


def select_targets(names: Sequence[str]) -> tuple[Target, ...]:
    """Return the targets called ``names``, each once, in the given order.

    Raises:
        OutputError: there is none, or one is unknown.
    """
    targets = load_targets()
    if not names:
        raise OutputError(f"no target was given; choose from {', '.join(targets)}")
    for name in names:
        if name not in targets:
            raise OutputError(f"unknown target {name!r}; known targets: {', '.join(targets)}")
    return tuple(targets[name] for name in dict.fromkeys(names))


def case_of(facts: ModelFacts, granularity: str = "tensor", fp8_format: str = "e4m3fn") -> Case:
    """Return what the rules ask about the model with these ``facts``."""
    return Case(
        attention=facts.attention,
        quant_method=base_method(facts),
        model_type=facts.model_type,
        granularity=granularity,
        fp8_format=fp8_format,
        has_scheme=isinstance(facts.quantization.get("kv_cache_scheme"), Mapping),
    )


def base_method(facts: ModelFacts) -> str:
    """Return the ``quant_method`` of the checkpoint, ``none`` if it has no quantisation config at all."""
    if facts.quant_method is None and not facts.quantization:
        return UNQUANTISED
    return facts.quant_method or "unnamed"


def check_target(
    target: Target, facts: ModelFacts, granularity: str = "tensor", fp8_format: str = "e4m3fn"
) -> TargetEffect:
    """Say what ``target`` does with scales that fp8kv adds to the checkpoint with these ``facts``."""
    case = case_of(facts, granularity, fp8_format)
    rule = effect_rule(target, case)
    return TargetEffect(
        target=target.name,
        loads=rule.effect,
        reason=f"{target.engine} {target.version} {rule.reason}",
        serve=_first(target.serve, case).command,
        source=rule.source,
    )


def effect_rule(target: Target, case: Case) -> EffectRule:
    """Return the rule that decides what ``target`` does in this ``case``."""
    return _first(target.effects, case)


def names_rule(target: Target, case: Case) -> NamesRule:
    """Return the spellings for ``target`` in this ``case``."""
    return _first(target.names, case)


def config_needed(target: Target, case: Case) -> Mapping[str, Any]:
    """Return what the quantisation config must say for ``target``; empty where it ignores the scales anyway."""
    rule = _config_rule(target, case)
    return rule.set if rule else {}


def config_lacks(target: Target, case: Case, quantization: Mapping[str, Any]) -> list[str]:
    """Return the keys that ``target`` needs and that ``quantization`` lacks or has with another value."""
    rule = _config_rule(target, case)
    if rule is None or (rule.instead and not _lacks(rule.instead, quantization)):
        return []
    return _lacks(rule.set, quantization)


def forbidden_keys(target: Target, case: Case) -> ForbidRule | None:
    """Return the keys that other targets must not add in this ``case``, or None."""
    return next((rule for rule in target.forbid if rule.when.holds(case)), None)


def files_rule(target: Target, case: Case) -> FilesRule | None:
    """Return the other files of ``target`` in this ``case``, or None."""
    return next((rule for rule in target.files if rule.when.holds(case)), None)


def _config_rule(target: Target, case: Case) -> ConfigRule | None:
    if effect_rule(target, case).effect != "loads":
        return None
    return next((rule for rule in target.config if rule.when.holds(case)), None)


def _lacks(needed: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of ``needed`` that ``found`` does not hold; further keys of ``found`` do not matter."""
    missing = []
    for key, value in needed.items():
        other = found.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            missing += [f"{key}.{inner}" for inner in _lacks(value, other)]
        elif key not in found or other != value:
            missing.append(key)
    return missing


class _HasWhen(Protocol):
    @property
    def when(self) -> When: ...


_Rule = TypeVar("_Rule", bound=_HasWhen)


def _first(rules: Sequence[_Rule], case: Case) -> _Rule:
    # Every list that is read through here ends in `when: {}`.
    return next(rule for rule in rules if rule.when.holds(case))
