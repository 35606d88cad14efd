"""Write a planned checkpoint: built beside, read back, then renamed, so that a crash leaves nothing or the whole.

The source is never changed: its files are linked or copied, and nothing that shares data with them is opened for
writing.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.overlay.linking import LinkMode, place
from fp8kv.calibrate.overlay.plan import OverlayPlan
from fp8kv.recipes.errors import CheckpointError, OutputError


@dataclass(frozen=True)
class WriteReport:
    """What was written.

    Attributes:
        directory: the checkpoint.
        placed: how many of the source's files came in each way: hard, reflink, symlink or copy.
    """

    directory: Path
    placed: Mapping[str, int]


def write_overlay(plan: OverlayPlan, out: str | Path, *, link: LinkMode = "auto") -> WriteReport:
    """Write ``plan`` to the new directory ``out``.

    The work goes on in a hidden directory beside ``out``, which takes its name at the end, when everything is on the
    disk and has been read back. Whatever stops it removes that directory; what a killed run left of it, the next
    run for the same ``out`` removes.

    Args:
        plan: what to write.
        out: must not exist; its parents are made.
        link: how the source's weights get there; ``auto`` tries hard link, reflink and symbolic link, and never copies.

    Raises:
        OutputError: ``out`` exists, is the source or lies inside it; there is no space left; another run is writing
            it; or what was written does not read back.
    """
    out = Path(os.path.abspath(out))
    check_output(plan.checkpoint.path, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        if link == "copy":
            _check_space(plan, out)
        partial = _partial_name(out)
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {out}: {_reason(error)}; nothing was written") from error
    lock = None
    try:
        lock = _try_lock(partial)
        placed = _fill(partial, plan, link)
        _read_back(partial, plan)
        os.rename(partial, out)
        _sync(out.parent)
    except BaseException as error:
        state = _discard(partial)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {out}: {_reason(error)}; {state}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return WriteReport(out, placed)


def check_output(source: Path, out: str | Path) -> None:
    """Refuse a place where nothing may be written; callers with hours of work ahead ask this first.

    Args:
        source: the directory of the checkpoint.
        out: the directory to be made.

    Raises:
        OutputError: ``out`` exists, is the source or lies inside it.
    """
    out = Path(os.path.abspath(out))
    source = source.resolve()
    resolved = out.resolve()
    if resolved == source:
        raise OutputError(f"the output {out} is the source itself; name a new directory")
    if source in resolved.parents:
        raise OutputError(
            f"the output {out} lies inside the source {source}; name a directory outside"
        )
    if os.path.lexists(out):
        raise OutputError(
            f"{out} exists, and fp8kv never overwrites; name a new directory or remove it"
        )


def _check_space(plan: OverlayPlan, out: Path) -> None:
    needed = plan.new_bytes + plan.weight_bytes
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise OutputError(
            f"copying the weights to {out} takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "free some space, or link them (link mode auto)"
        )


def _partial_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.fp8kv-partial-{secrets.token_hex(4)}")


def _remove_stale(out: Path) -> None:
    """Remove what a killed run for the same output left, unless it still runs."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.fp8kv-partial-[0-9a-f]{{8}}")
    for path in out.parent.iterdir():
        if pattern.fullmatch(path.name) is None or path.is_symlink() or not path.is_dir():
            continue
        lock = _try_lock(path)
        if lock is None:
            raise OutputError(
                f"another fp8kv is writing {out} (in {path.name}); wait for it to end"
            )
        shutil.rmtree(path)
        os.close(lock)


def _try_lock(directory: Path) -> int | None:
    """Return a descriptor that holds the lock of ``directory``, or None if another process holds it.

    The system drops the lock when the process ends, however it ends.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks: two runs for one output at the same time are then the user's to avoid
    return descriptor


def _fill(partial: Path, plan: OverlayPlan, link: LinkMode) -> dict[str, int]:
    placed: Counter[str] = Counter()
    for name, source in plan.links.items():
        destination = partial / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        way = place(Path(source), destination, link)
        if way in ("copy", "reflink"):
            _sync(destination)
        placed[way] += 1
    for name, content in plan.new_files.items():
        destination = partial / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        with destination.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for folder, _, _ in os.walk(partial, topdown=False):
        _sync(Path(folder))
    return dict(placed)


def _read_back(partial: Path, plan: OverlayPlan) -> None:
    """Open what was written as a reader would, and compare it with the plan."""
    try:
        written = open_checkpoint(partial)
    except CheckpointError as error:
        raise OutputError(f"what was written does not open: {error}") from error
    problems = []
    if written.config_text != plan.config_text:
        problems.append("config.json differs")
    if written.index_text != plan.index_text:
        problems.append("the index differs")
    if set(written.weight_map) != {*plan.checkpoint.weight_map, *plan.tensors}:
        problems.append("the tensor names differ")
    for name, source in plan.shards.items():
        expected, found = plan.checkpoint.shards[source], written.shards.get(name)
        if found is None or (found.sha256, found.file_size) != (
            expected.sha256,
            expected.file_size,
        ):
            problems.append(f"{name} is not {source} of the source as it was opened")
    for name, tensor in plan.tensors.items():
        if name in written.weight_map and not _same(written.read(name), tensor):
            problems.append(f"{name} differs")
    if problems:
        raise OutputError(
            f"what was written does not read back: {problems[0]}"
            f"{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}; "
            "check the disk, and that nothing changes the source meanwhile"
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Scales are positive and finite, so equal numbers have equal bits.
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _discard(partial: Path) -> str:
    """Remove the partial output and say how that went."""
    if not partial.exists():
        return "nothing of it is left"
    shutil.rmtree(partial, ignore_errors=True)
    if partial.exists():
        return f"the partial output {partial} could not be removed, so remove it by hand"
    return "the partial output was removed, the source is untouched"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (
        f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror or error)
    )
