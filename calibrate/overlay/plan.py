"""Decide what a converted checkpoint will hold, before anything is written.

The plan is pure: it reads the source's directory and writes nothing, so ``--dry-run`` and the writer see the same.
What goes where follows from ``formats/targets.yaml``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fp8kv import __version__
from fp8kv.calibrate.formats.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint
from fp8kv.calibrate.formats.config_text import set_json_keys
from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.formats.targets import TargetEffect, check_target, select_targets
from fp8kv.calibrate.overlay.checks import check_scales, check_source, check_targets
from fp8kv.calibrate.overlay.linking import carried_files
from fp8kv.calibrate.overlay.manifest import (
    MANIFEST_FILE,
    ORIGINAL_FOLDER,
    SCALES_FILE,
    SIDE_FOLDER,
    BaseShard,
    Manifest,
)
from fp8kv.calibrate.overlay.parts import (
    choose_spellings,
    config_edits,
    index_with,
    other_files,
    scale_tensors,
    shard_name,
)
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.recipes.errors import OutputError


@dataclass(frozen=True)
class OverlayPlan:
    """All that a converted checkpoint will hold.

    Attributes:
        checkpoint: the source.
        tensors: the scales by tensor name, float32.
        config_text: the new ``config.json``.
        index_text: the new ``model.safetensors.index.json``.
        links: name in the output -> file of the source that belongs there, unchanged.
        extra: name in the output -> content, of all further new files; the scale file and the manifest among them.
        effects: what each target does with the result, for printing.
        shards: name in the output -> shard of the source; these are among ``links``.
        left_out: name in the source -> why it does not go along.
        manifest: the record that strip and validate read.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    config_text: str
    index_text: str
    links: Mapping[str, str]
    extra: Mapping[str, bytes]
    effects: tuple[TargetEffect, ...]
    shards: Mapping[str, str]
    left_out: Mapping[str, str]
    manifest: Manifest

    @property
    def new_files(self) -> dict[str, bytes]:
        """Every file that is written rather than linked, by name in the output."""
        return {
            CONFIG_FILE: self.config_text.encode(),
            INDEX_FILE: self.index_text.encode(),
            **self.extra,
        }

    @property
    def new_bytes(self) -> int:
        """Size of all new files together."""
        return sum(len(content) for content in self.new_files.values())

    @property
    def weight_bytes(self) -> int:
        """Size of the source's shards, which are linked, not copied, unless the user asks for copies."""
        return sum(header.file_size for header in self.checkpoint.shards.values())


def plan_overlay(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    scales: ScaleSet,
    targets: Sequence[str],
    extra: Mapping[str, bytes] | None = None,
    *,
    estimator: str | None = None,
) -> OverlayPlan:
    """Plan a checkpoint that is ``checkpoint`` with ``scales`` added.

    Args:
        checkpoint: the source; nothing of it is changed.
        facts: its facts.
        scales: one entry for each layer of ``facts``.
        targets: names of the engines that it is for.
        extra: further files for the folder ``fp8kv``: name below it -> content.
        estimator: how the scales were chosen, for the record; ``validate`` judges clipping by it.

    Raises:
        UnsupportedModelError: the model or its quantisation cannot carry KV scales that a target would use.
        ScaleError: the scales do not fit the model, or a target refuses their format or granularity.
        OutputError: the source has scales already, a target is unknown, or two targets contradict each other.
    """
    chosen = select_targets(targets)
    check_source(checkpoint, facts)
    check_scales(facts, scales)
    check_targets(facts, scales, chosen)

    tensors = scale_tensors(scales, choose_spellings(facts, scales, chosen))
    shards = {shard_name(checkpoint, name): name for name in checkpoint.shards}
    new: dict[str, bytes] = {
        SCALES_FILE: safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    }
    originals = {CONFIG_FILE: checkpoint.config_text}
    if checkpoint.index_text is not None:
        originals[INDEX_FILE] = checkpoint.index_text
    for name, (before, after) in other_files(checkpoint, facts, scales, chosen).items():
        new[name] = after.encode()
        if before is not None:
            originals[name] = before
    for name, text in originals.items():
        new[f"{ORIGINAL_FOLDER}/{name}"] = text.encode()
    for name, content in (extra or {}).items():
        new[_side_name(name, new)] = content

    config = set_json_keys(checkpoint.config_text, config_edits(facts, scales, chosen))
    index = index_with(checkpoint, shards, tensors)
    hashes = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in {
            CONFIG_FILE: config.encode(),
            INDEX_FILE: index.encode(),
            **new,
        }.items()
    }
    manifest = Manifest(
        fp8kv=__version__,
        source=checkpoint.source,
        revision=checkpoint.revision,
        model_type=facts.model_type,
        attention=facts.attention,
        fp8_format=scales.fp8_format,
        granularity=scales.granularity,
        estimator=estimator,
        targets=tuple(target.name for target in chosen),
        layers=tuple(layer.name for layer in scales.layers),
        tensors=tuple(tensors),
        digest=checkpoint.digest(),
        shards={
            name: BaseShard(
                source, checkpoint.shards[source].file_size, checkpoint.shards[source].sha256
            )
            for name, source in shards.items()
        },
        added={name: sha256 for name, sha256 in hashes.items() if name not in originals},
        changed={name: sha256 for name, sha256 in hashes.items() if name in originals},
    )
    new[MANIFEST_FILE] = manifest.to_text().encode()

    # A single file that stands beside an index is left behind: transformers would read it and not the index.
    skip = {*checkpoint.shards, SINGLE_FILE, f"{SIDE_FOLDER}/", CONFIG_FILE, INDEX_FILE, *new}
    carried, left_out = carried_files(checkpoint.path, skip)
    links = {name: str(checkpoint.path / source) for name, source in shards.items()}
    return OverlayPlan(
        checkpoint=checkpoint,
        tensors=tensors,
        config_text=config,
        index_text=index,
        links=links | {name: str(path) for name, path in carried.items()},
        extra=new,
        effects=tuple(
            check_target(target, facts, scales.granularity, scales.fp8_format) for target in chosen
        ),
        shards=shards,
        left_out=left_out,
        manifest=manifest,
    )


def _side_name(name: str, taken: Mapping[str, bytes]) -> str:
    path = Path(name)
    full = f"{SIDE_FOLDER}/{path.as_posix()}"
    if not name or path.is_absolute() or ".." in path.parts or full in {*taken, MANIFEST_FILE}:
        raise OutputError(
            f"{name!r} cannot be a file of the folder {SIDE_FOLDER}; use a plain name that is not taken"
        )
    return full
