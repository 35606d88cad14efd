"""Bring the files of a source checkpoint into another directory without copying its weights."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from fp8kv.recipes.errors import OutputError

LinkMode = Literal["auto", "hard", "reflink", "symlink", "copy"]

# Files up to this size are copied in every mode: nobody expects that editing a tokenizer config in the output also
# edits it in the source, as it would through a hard link.
COPY_LIMIT_BYTES = 64 * 1024 * 1024

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FICLONE = 0x40049409  # Linux: share the blocks of another file, copy on write


def carried_files(source: Path, skip: Collection[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """List what else of ``source`` belongs into a converted checkpoint: tokenizer, code, templates.

    Args:
        source: the checkpoint's directory.
        skip: names, relative to it, that the caller takes care of; a name ending in ``/`` skips a folder.

    Returns:
        Relative name -> file, and relative name -> reason for what is left behind.
    """
    carried: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        for name in sorted(folders):
            relative = (here / name).relative_to(source).as_posix()
            if name.startswith(".") or f"{relative}/" in skip or (here / name).is_symlink():
                folders.remove(name)
                if f"{relative}/" not in skip:
                    left_out[f"{relative}/"] = "a hidden or linked folder"
        folders.sort()
        for name in sorted(files):
            relative = (here / name).relative_to(source).as_posix()
            if relative in skip:
                continue
            if name.startswith("."):
                left_out[relative] = "a hidden file"
            elif name.lower().endswith(_PICKLES):
                left_out[relative] = "a pickle, or weights in another format"
            elif not (here / name).is_file():
                left_out[relative] = "not a regular file"
            else:
                carried[relative] = here / name
    return carried, left_out


def place(source: Path, destination: Path, mode: LinkMode) -> str:
    """Make ``destination`` hold the content of ``source`` and return how: a mode other than ``auto``.

    ``auto`` tries a hard link, a reflink and a symbolic link, in this order, and never copies weights. Links are made
    to the file itself, never to a link on the way to it. Neither file is opened for writing where they share data.

    Raises:
        OutputError: the file system does not offer the link that was asked for.
        OSError: anything else went wrong, e.g. the disk is full.
    """
    target = source.resolve()
    if mode == "copy" or (is_small(target) and source.suffix != ".safetensors"):
        shutil.copyfile(target, destination)
        return "copy"
    if mode == "auto":
        for candidate in ("hard", "reflink"):
            try:
                _WAYS[candidate](target, destination)
            except OSError:
                continue
            return candidate
        _WAYS["symlink"](target, destination)
        return "symlink"
    try:
        _WAYS[mode](target, destination)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise OutputError(
            f"cannot make a {mode} link from {destination.parent} to {target}: {error.strerror}; "
            "use another link mode, e.g. symlink"
        ) from None
    return mode


def is_small(path: Path) -> bool:
    """Tell whether a file is copied rather than linked, by its size."""
    return path.stat().st_size <= COPY_LIMIT_BYTES


def _reflink(source: Path, destination: Path) -> None:
    with source.open("rb") as read, destination.open("xb") as written:
        try:
            fcntl.ioctl(written.fileno(), _FICLONE, read.fileno())
        except OSError:
            destination.unlink()
            raise


_WAYS: Mapping[str, Callable[[Path, Path], None]] = {
    "hard": lambda source, destination: os.link(source, destination),
    "reflink": _reflink,
    "symlink": lambda source, destination: os.symlink(source, destination),
}
_UNSUPPORTED = frozenset(
    {
        errno.EXDEV,
        errno.EPERM,
        errno.EMLINK,
        errno.ENOTTY,
        errno.EINVAL,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
    }
)
