"""The parts of an overlay: scale tensors, index, edits of ``config.json``, other files. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import SINGLE_FILE, Checkpoint
from fp8kv.calibrate.formats.config_text import Edit, nested_edits, set_json_keys
from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.formats.json_text import read_object
from fp8kv.calibrate.formats.target_table import Spelling, Target, load_table
from fp8kv.calibrate.formats.targets import (
    UNQUANTISED,
    case_of,
    check_target,
    config_needed,
    files_rule,
    forbidden_keys,
    names_rule,
)
from fp8kv.calibrate.overlay.manifest import SCALES_FILE
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes.errors import OutputError


def scale_tensors(scales: ScaleSet, spellings: Sequence[Spelling]) -> dict[str, Tensor]:
    """Return the scales under each of ``spellings``, in model order, K before V.

    Returns:
        Tensor name -> float32 of the spelling's shape, or ``[heads, 1, 1]`` with one scale per head.
    """
    tensors: dict[str, Tensor] = {}
    for layer in scales.layers:
        for spelling in spellings:
            for stream, values in _streams(layer):
                shape = (len(values), 1, 1) if scales.granularity == "head" else spelling.shape
                value = torch.tensor(values, dtype=torch.float32).reshape(shape)
                tensors[spelling.name(layer.name, stream)] = value
    return tensors


def index_with(
    checkpoint: Checkpoint, shards: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> str:
    """Return the index of ``checkpoint`` with the scale tensors in it and its shards under their new names.

    Args:
        checkpoint: the source, with or without an index.
        shards: new name of a shard -> its name in the source.
        tensors: the scales.
    """
    renamed = {source: name for name, source in shards.items()}
    added_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if checkpoint.index_text is None:
        header = checkpoint.shards[SINGLE_FILE]
        size = header.file_size - header.data_start + added_bytes
        names = dict.fromkeys(checkpoint.weight_map, renamed[SINGLE_FILE])
        names |= dict.fromkeys(tensors, SCALES_FILE)
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        return json.dumps(content, indent=2) + "\n"
    edits: list[Edit] = [
        (("weight_map", name), renamed[shard])
        for name, shard in checkpoint.weight_map.items()
        if renamed[shard] != shard
    ]
    edits += [(("weight_map", name), SCALES_FILE) for name in tensors]
    metadata = json.loads(checkpoint.index_text).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, int | float) and not isinstance(total, bool):
        edits.append((("metadata", "total_size"), total + added_bytes))
    return set_json_keys(checkpoint.index_text, edits)


def choose_spellings(
    facts: ModelFacts, scales: ScaleSet, targets: Sequence[Target]
) -> list[Spelling]:
    """Return how to spell the names: as the targets load them; if none does, the harmless way."""
    case = case_of(facts, scales.granularity, scales.fp8_format)
    effects = [
        check_target(target, facts, scales.granularity, scales.fp8_format) for target in targets
    ]
    loading = [
        target for target, effect in zip(targets, effects, strict=True) if effect.loads == "loads"
    ]
    wanted = {name for target in loading or targets for name in names_rule(target, case).write}
    return [spelling for name, spelling in load_table().spellings.items() if name in wanted]


def config_edits(facts: ModelFacts, scales: ScaleSet, targets: Sequence[Target]) -> list[Edit]:
    """Return the edits of ``config.json`` that the targets need, none where they ignore the scales anyway.

    Raises:
        OutputError: two targets need different values, or one needs a key that another must not see.
    """
    case = case_of(facts, scales.granularity, scales.fp8_format)
    merged: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for target in targets:
        for key, value in config_needed(target, case).items():
            if merged.setdefault(key, value) != value:
                raise OutputError(
                    f"targets {owner[key]} and {target.name} need different values of quantization_config.{key} "
                    f"({merged[key]!r} and {value!r}), and config.json holds one; write one output for each"
                )
            owner.setdefault(key, target.name)
    for target in targets:
        rule = forbidden_keys(target, case)
        for key in rule.keys if rule else ():
            if rule and key in merged:
                raise OutputError(
                    f"targets {owner[key]} and {target.name} exclude each other for this model: the first needs "
                    f"quantization_config.{key}, and for {target.engine} {target.version} {rule.reason}; "
                    "write one output for each"
                )
    if not merged:
        return []
    if case.quant_method == UNQUANTISED:
        return [(("quantization_config",), merged)]
    # ModelOpt may keep its config in hf_quant_config.json alone; that file is edited, see other_files.
    return nested_edits(facts.quantization_location, merged) if facts.quantization_location else []


def other_files(
    checkpoint: Checkpoint, facts: ModelFacts, scales: ScaleSet, targets: Sequence[Target]
) -> dict[str, tuple[str | None, str]]:
    """Return the JSON files that targets need beside config.json: name -> (text before or None, text after)."""
    case = case_of(facts, scales.granularity, scales.fp8_format)
    result: dict[str, tuple[str | None, str]] = {}
    for target in targets:
        rule = files_rule(target, case)
        if rule is None:
            continue
        for name, content in rule.create.items():
            result[name] = (None, json.dumps(content, indent=2) + "\n")
        for name, content in rule.edit.items():
            if (checkpoint.path / name).is_file():
                before = read_object(checkpoint.path / name)[1]
                edits = [edit for key in content for edit in nested_edits((key,), content[key])]
                result[name] = (before, set_json_keys(before, edits))
    return result


def shard_name(checkpoint: Checkpoint, name: str) -> str:
    """Return the name of a shard in the output; ``model.safetensors`` there would hide the index."""
    if name != SINGLE_FILE:
        return name
    renamed = "model-00001-of-00001.safetensors"
    return renamed if renamed not in checkpoint.shards else "model-00000-of-00001.safetensors"


def _streams(layer: LayerScales) -> tuple[tuple[str, tuple[float, ...]], ...]:
    return ("k", layer.k), ("v", layer.v)
