"""Match a transformers model's attention modules with the layers that its checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping

from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.modeling.tap import AttentionModule
from fp8kv.recipes.errors import UnsupportedModelError


def match_layers(modules: Mapping[str, AttentionModule], facts: ModelFacts) -> dict[str, str]:
    """Return the checkpoint-side layer name for each module name.

    Wrappers name the same layer differently (``model.language_model.layers.0`` and
    ``language_model.model.layers.0``), so what follows ``layers.`` decides.

    Raises:
        UnsupportedModelError: the two sides do not match one to one, or differ in attention kind.
    """
    by_suffix = {_suffix(layer.name): layer.name for layer in facts.layers}
    found = {name: by_suffix.get(_suffix(name)) for name in modules}
    unknown = [name for name, layer in found.items() if layer is None]
    missing = sorted(set(by_suffix.values()) - set(found.values()), key=_by_number)
    if unknown or missing:
        raise UnsupportedModelError(
            f"the attention layers of {facts.architecture} in transformers and in the checkpoint do not match: "
            f"{len(missing)} only in the checkpoint ({', '.join(missing[:3]) or 'none'}), "
            f"{len(unknown)} only in the model ({', '.join(unknown[:3]) or 'none'})"
        )
    for name, attention in modules.items():
        if attention.attention != facts.attention:
            raise UnsupportedModelError(
                f"{name} is {attention.attention} in transformers, but {facts.architecture} is {facts.attention}"
            )
    return {name: layer for name, layer in found.items() if layer is not None}


def _suffix(name: str) -> str:
    return name.rsplit("layers.", 1)[-1]


def _by_number(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
