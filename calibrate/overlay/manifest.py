"""What fp8kv writes beside a checkpoint's own files, and the record of it.

    config.json                               edited
    model.safetensors.index.json              edited, or new for a single-file source
    model-kv-scales.safetensors               the scales
    fp8kv/manifest.json                       this module's record
    fp8kv/original/...                        edited files as they were
    fp8kv/...                                 statistics, recipe: whatever the caller adds

Engines read every ``*.safetensors`` at the top level, so nothing else of ours lies there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8kv.calibrate.formats.json_text import read_object
from fp8kv.recipes.errors import CheckpointError

SCHEMA = 1
SCALES_FILE = "model-kv-scales.safetensors"
SIDE_FOLDER = "fp8kv"
MANIFEST_FILE = f"{SIDE_FOLDER}/manifest.json"
ORIGINAL_FOLDER = f"{SIDE_FOLDER}/original"


@dataclass(frozen=True)
class BaseShard:
    """One shard of the source as it was when the overlay was planned.

    Attributes:
        source_name: its file name in the source, which differs where a single file had to become a shard.
        size: in bytes.
        header_sha256: hash of its safetensors header.
    """

    source_name: str
    size: int
    header_sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``fp8kv/manifest.json``.

    Attributes:
        fp8kv: version of the writer.
        source: directory or hub id of the checkpoint that was calibrated.
        revision: its commit, if it came from the hub.
        model_type: of the text model.
        attention: ``gqa`` or ``mla``.
        fp8_format: the format that the scales are for.
        granularity: ``tensor`` or ``head``.
        estimator: how the scales were chosen; None if the caller did not say.
        targets: what the checkpoint was written for.
        layers: attention modules that have scales.
        tensors: names of the scale tensors.
        digest: of the source, see :meth:`fp8kv.calibrate.formats.checkpoint.Checkpoint.digest`.
        shards: file name here -> shard of the source.
        added: files that the source did not have -> SHA-256; this file is not among them.
        changed: files that differ from the source's -> SHA-256 as written; the original is in ``fp8kv/original``.
    """

    fp8kv: str
    source: str
    revision: str | None
    model_type: str
    attention: str
    fp8_format: str
    granularity: str
    estimator: str | None
    targets: tuple[str, ...]
    layers: tuple[str, ...]
    tensors: tuple[str, ...]
    digest: str
    shards: Mapping[str, BaseShard]
    added: Mapping[str, str]
    changed: Mapping[str, str]

    def to_text(self) -> str:
        """Return the JSON text; :meth:`from_json` of it is the inverse."""
        fields = asdict(self)
        base = {"digest": fields.pop("digest"), "shards": fields.pop("shards")}
        content = {"schema": SCHEMA, **fields, "base": base}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Manifest:
        """Build a manifest from parsed JSON; ``where`` names the file in errors.

        Raises:
            CheckpointError: the schema is another one, or a key is missing or malformed.
        """
        if content.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{where} has schema {content.get('schema')!r}, and this fp8kv knows {SCHEMA}; "
                "use the fp8kv that wrote it"
            )
        try:
            base = content["base"]
            return cls(
                fp8kv=content["fp8kv"],
                source=content["source"],
                revision=content["revision"],
                model_type=content["model_type"],
                attention=content["attention"],
                fp8_format=content["fp8_format"],
                granularity=content["granularity"],
                estimator=content["estimator"],
                targets=tuple(content["targets"]),
                layers=tuple(content["layers"]),
                tensors=tuple(content["tensors"]),
                digest=base["digest"],
                shards={name: BaseShard(**shard) for name, shard in base["shards"].items()},
                added=dict(content["added"]),
                changed=dict(content["changed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{where} is damaged ({error!r}); restore it from where the checkpoint came from"
            ) from None


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of ``directory``, or None if fp8kv did not write it.

    Raises:
        CheckpointError: the manifest is there but cannot be read.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    return Manifest.from_json(read_object(path)[0], str(path))
