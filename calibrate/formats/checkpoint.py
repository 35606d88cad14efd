"""Open a Hugging Face checkpoint: config, index and shard headers, without loading weights.

A checkpoint is a directory with ``config.json`` and either ``model.safetensors.index.json`` and the shards that it
names, or one ``model.safetensors``. Everything that a reader could trip over later is refused here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8kv.calibrate.formats.json_text import read_object, show
from fp8kv.calibrate.formats.safetensors_file import SafetensorsHeader, TensorEntry, read_header
from fp8kv.recipes.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened and checked; the weights are still on disk.

    Attributes:
        path: the directory.
        source: what the user named: the directory or the hub id.
        revision: the commit of a hub download, None for a directory.
        config: the parsed ``config.json``.
        config_text: ``config.json`` as it stands.
        index_text: ``model.safetensors.index.json`` as it stands, None for a single-file checkpoint.
        weight_map: tensor name -> shard file name; filled for a single file, too.
        shards: shard file name -> header.
    """

    path: Path
    source: str
    revision: str | None
    config: Mapping[str, Any]
    config_text: str
    index_text: str | None
    weight_map: Mapping[str, str]
    shards: Mapping[str, SafetensorsHeader]

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape and byte range of the tensor called ``name``.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self.shards[self._shard_of(name)].tensors[name]

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        return dict(self.read_many([name]))[name]

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor for each of ``names``, shard by shard, opening each shard once.

        Raises:
            CheckpointError: a tensor does not exist or cannot be read.
        """
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._shard_of(name), []).append(name)
        for shard, members in by_shard.items():
            try:
                with safe_open(self.path / shard, framework="pt", device="cpu") as file:
                    for name in members:
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"cannot read {self.path / shard}: {error}; has it changed since it was opened?"
                ) from error

    def digest(self) -> str:
        """Return a SHA-256 that identifies the checkpoint without reading its weights.

        It covers the text of ``config.json`` and the name, header hash and size of each shard.
        """
        digest = hashlib.sha256(hashlib.sha256(self.config_text.encode()).digest())
        for shard, header in sorted(self.shards.items()):
            digest.update(f"{shard}\0{header.sha256}\0{header.file_size}\n".encode())
        return digest.hexdigest()

    def _shard_of(self, name: str) -> str:
        try:
            return self.weight_map[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor called {show(name)}; check the tensor's name"
            ) from None


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a directory, or download a hub repository and open it.

    Memory: the headers of all shards, a few hundred bytes for each tensor.

    Args:
        model: a directory; or ``org/name`` of a hub repository, if no such directory exists.
        revision: branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: nothing is there, it cannot be downloaded, it is not a safetensors checkpoint, or its
            config, index and shards are damaged or contradict each other.
    """
    source = str(model)
    path = Path(os.path.expanduser(source))
    commit = None
    if source and os.path.isdir(path):
        if revision is not None:
            raise CheckpointError(
                f"{source} is a directory, which has no revisions; leave out revision {revision!r}"
            )
    elif source and os.path.exists(path):
        raise CheckpointError(f"{source} is a file; name the directory that holds config.json")
    elif _HUB_ID.fullmatch(source):
        path = _download(source, revision)
        commit = path.name if path.parent.name == "snapshots" else revision
    else:
        raise CheckpointError(
            f"{source or 'the empty path'} does not exist; name a checkpoint directory or a hub id such as org/name"
        )
    return _open_directory(path, source, commit)


def _download(repository: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_HUB_PATTERNS))
        )
    except Exception as error:
        # The hub client's errors come from several libraries and have changed with its versions; all mean one thing.
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{repository} is neither a directory here nor a hub repository that could be "
            f"downloaded ({first_line}); check the name, the revision, the network and your hub login"
        ) from error


def _open_directory(path: Path, source: str, revision: str | None) -> Checkpoint:
    _refuse_other_formats(path)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG_FILE}; name the directory that holds the model's {CONFIG_FILE}"
        )
    config, config_text = read_object(path / CONFIG_FILE)
    index_text = None
    if (path / INDEX_FILE).is_file():
        weight_map, index_text = _read_index(path / INDEX_FILE)
        shards = {name: _read_shard(path, name) for name in dict.fromkeys(weight_map.values())}
        _check_index(path, weight_map, shards)
    elif (path / SINGLE_FILE).is_file():
        shards = {SINGLE_FILE: read_header(path / SINGLE_FILE)}
        weight_map = dict.fromkeys(shards[SINGLE_FILE].tensors, SINGLE_FILE)
    else:
        raise CheckpointError(
            f"{path} has neither {INDEX_FILE} nor {SINGLE_FILE}; download the checkpoint again"
        )
    return Checkpoint(
        path=path,
        source=source,
        revision=revision,
        config=config,
        config_text=config_text,
        index_text=index_text,
        weight_map=weight_map,
        shards=shards,
    )


def _refuse_other_formats(path: Path) -> None:
    if any(path.glob("*.safetensors")) or (path / INDEX_FILE).exists():
        return
    gguf = next(path.glob("*.gguf"), None)
    if gguf is not None:
        raise CheckpointError(
            f"{gguf} is GGUF, which has no FP8 KV scales; use the safetensors release of the model"
        )
    pickle = next((file for pattern in _PICKLES for file in path.glob(pattern)), None)
    if pickle is not None:
        raise CheckpointError(
            f"{path} holds only pickled weights ({pickle.name}), which can run code when read; "
            "convert them to safetensors first"
        )


def _read_index(path: Path) -> tuple[dict[str, str], str]:
    index, text = read_object(path, unique_keys=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} maps tensor {show(name)} to {show(shard)}, which is no safetensors file; "
                "download it again"
            )
        # A link that the file system follows is fine (the hub cache is made of them), a path is not.
        if "/" in shard or "\\" in shard or not shard.isprintable() or len(shard) > 200:
            raise CheckpointError(
                f"{path} maps tensor {show(name)} to {show(shard)}, which leaves the checkpoint's "
                "directory; a shard must be a plain file name"
            )
    return weight_map, text


def _read_shard(path: Path, shard: str) -> SafetensorsHeader:
    if not (path / shard).exists():
        raise CheckpointError(
            f"{path / INDEX_FILE} names the shard {shard}, which is missing; download it again"
        )
    return read_header(path / shard)


def _check_index(
    path: Path, weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsHeader]
) -> None:
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(
                f"{path / INDEX_FILE} places tensor {show(name)} in {shard}, which does not hold it; "
                "download both again"
            )
    owner: dict[str, str] = {}
    for shard, header in shards.items():
        for name in header.tensors:
            if owner.setdefault(name, shard) != shard:
                raise CheckpointError(
                    f"tensor {show(name)} is in both {owner[name]} and {shard} of {path}; readers differ "
                    "in which they take, so remove one"
                )
    if (path / SINGLE_FILE).exists() and set(shards) != {SINGLE_FILE}:
        _check_single_agrees(path, weight_map, shards)


def _check_single_agrees(
    path: Path, weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsHeader]
) -> None:
    """Refuse a single file beside an index that says something else: transformers reads the one, engines the other."""
    single = read_header(path / SINGLE_FILE).tensors
    for name in sorted({*single, *weight_map}):
        ours = shards[weight_map[name]].tensors[name] if name in weight_map else None
        theirs = single.get(name)
        if (
            ours is None
            or theirs is None
            or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape)
        ):
            raise CheckpointError(
                f"{path} holds {SINGLE_FILE} and {INDEX_FILE}, which disagree about tensor "
                f"{show(name)}: transformers reads the first, engines the second; remove one"
            )
