"""Take the scales out of a checkpoint that fp8kv wrote, and leave what it was made from.

The order of the steps is such that a reader can load the directory after each of them, and that a second run
finishes what a killed one began:

1. a renamed shard gets its old name beside the new one;
2. the index becomes the source's, or goes if the source had none: no reader that follows it sees scales now;
3. the scale file goes: no reader that takes every file sees scales now;
4. ``config.json`` and other edited files become the source's, for a config without KV scheme beside scale tensors
   stops some engines;
5. other added files and the new shard names go;
6. the folder ``fp8kv`` goes, its manifest last.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from fp8kv.calibrate.formats.checkpoint import INDEX_FILE, open_checkpoint
from fp8kv.calibrate.formats.kv_names import is_kv_scale_name
from fp8kv.calibrate.overlay.manifest import (
    MANIFEST_FILE,
    ORIGINAL_FOLDER,
    SCALES_FILE,
    SIDE_FOLDER,
    Manifest,
    read_manifest,
)
from fp8kv.recipes.errors import OutputError


@dataclass(frozen=True)
class StripReport:
    """What :func:`strip` did.

    Attributes:
        directory: the checkpoint.
        removed: files that fp8kv had added.
        restored: files that are as in the source again.
        kept: files in the folder ``fp8kv`` that fp8kv did not write.
    """

    directory: Path
    removed: tuple[str, ...]
    restored: tuple[str, ...]
    kept: tuple[str, ...]


def strip(directory: str | Path) -> StripReport:
    """Undo :func:`fp8kv.calibrate.overlay.writer.write_overlay` in place.

    It also removes the statistics in the folder ``fp8kv``. Running it again after an interruption is safe.

    Raises:
        OutputError: fp8kv did not write the directory; a file that it wrote was changed since; or a file cannot be
            removed.
        CheckpointError: the directory or its manifest cannot be read.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        if _finish_interrupted(directory):
            return StripReport(directory, (), (), ())
        raise OutputError(_nothing_to_strip(directory))
    _refuse_edited(directory, manifest)
    try:
        return _strip(directory, manifest)
    except OSError as error:
        raise OutputError(
            f"cannot strip {directory}: {error.strerror} ({error.filename}); "
            "it still loads: remove the cause and run strip again"
        ) from error


def _strip(directory: Path, manifest: Manifest) -> StripReport:
    removed: list[str] = []
    restored: list[str] = []

    def remove(name: str) -> None:
        if os.path.lexists(directory / name):
            os.unlink(directory / name)
            removed.append(name)

    def restore(name: str) -> None:
        original = directory / ORIGINAL_FOLDER / name
        if original.exists():
            os.replace(original, directory / name)
            restored.append(name)

    renamed = {
        name: shard.source_name
        for name, shard in manifest.shards.items()
        if name != shard.source_name
    }
    for name, source_name in renamed.items():
        _add_name(directory / name, directory / source_name)
    if INDEX_FILE in manifest.changed:
        restore(INDEX_FILE)
    else:
        remove(INDEX_FILE)
    remove(SCALES_FILE)
    for name in manifest.changed:
        restore(name)
    for name in manifest.added:
        if not name.startswith(f"{SIDE_FOLDER}/"):
            remove(name)
    for name, source_name in renamed.items():
        if (directory / source_name).exists() and os.path.lexists(directory / name):
            os.unlink(directory / name)
            restored.append(source_name)
    for name in manifest.added:
        remove(name)
    kept = _remove_side_folder(directory)
    removed.append(MANIFEST_FILE)
    return StripReport(directory, tuple(removed), tuple(restored), kept)


def _add_name(path: Path, name: Path) -> None:
    """Give the file at ``path`` the second name ``name``; where that is impossible, the only one."""
    if os.path.lexists(name) or not os.path.lexists(path):
        return
    try:
        os.link(path, name, follow_symlinks=False)
    except OSError:
        os.rename(path, name)


def _remove_side_folder(directory: Path) -> tuple[str, ...]:
    """Remove the manifest and the folders that are empty then; return the files that are not ours."""
    side = directory / SIDE_FOLDER
    folders = sorted((path for path in side.rglob("*") if path.is_dir()), reverse=True)
    for folder in folders:
        if not any(folder.iterdir()):
            folder.rmdir()
    os.unlink(directory / MANIFEST_FILE)
    kept = tuple(
        sorted(path.relative_to(directory).as_posix() for path in side.rglob("*") if path.is_file())
    )
    if not kept and not any(side.iterdir()):
        side.rmdir()
    return kept


def _finish_interrupted(directory: Path) -> bool:
    """Remove the empty folder that a run killed at its very last step leaves; tell whether it was there."""
    side = directory / SIDE_FOLDER
    if not side.is_dir() or any(side.iterdir()):
        return False
    side.rmdir()
    return True


def _refuse_edited(directory: Path, manifest: Manifest) -> None:
    """Refuse to overwrite what somebody changed after fp8kv wrote it."""
    for name, sha256 in {**manifest.changed, **manifest.added}.items():
        path, original = directory / name, directory / ORIGINAL_FOLDER / name
        ours = name in manifest.changed and original.exists()
        generated = name in manifest.added and not name.startswith(f"{SIDE_FOLDER}/")
        if not (ours or generated) or not path.exists():
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            hint = f"; the original is {original}" if ours else ""
            raise OutputError(
                f"{path} was changed after fp8kv wrote it, and stripping would lose that; "
                f"put the change aside first{hint}"
            )


def _nothing_to_strip(directory: Path) -> str:
    checkpoint = open_checkpoint(directory)
    names = [name for name in checkpoint.weight_map if is_kv_scale_name(name)]
    if names:
        return (
            f"{directory} has {len(names)} KV scale tensors but no {MANIFEST_FILE}: fp8kv did not write them, so there "
            "is no record of what the checkpoint was before; start from its source"
        )
    return f"{directory} has no {MANIFEST_FILE} and no KV scales: there is nothing to strip"
