"""Check the KV scales of a checkpoint, fp8kv's own or a foreign one.

:data:`CHECKS` is the whole list. A check that does not apply (the MLA rule on a GQA model, the manifest's record on a
foreign checkpoint) gives no line; every other gives one, passed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.formats.kv_names import find_kv_scales
from fp8kv.calibrate.overlay.manifest import SIDE_FOLDER, read_manifest
from fp8kv.calibrate.stats_file import FILE_NAME as STATISTICS_FILE
from fp8kv.calibrate.validation.context_checks import (
    check_base_untouched,
    check_index,
    check_plausible,
    check_targets,
    plausibility,
)
from fp8kv.calibrate.validation.scale_checks import (
    Check,
    Subject,
    check_aliases_agree,
    check_bfloat16_representable,
    check_dtype_and_shape,
    check_finite,
    check_k_and_v_present,
    check_layers_present,
    check_mla_k_equals_v,
    check_opens,
    check_positive,
)
from fp8kv.recipes.errors import CheckpointError, Fp8kvError

__all__ = [
    "CHECKS",
    "AbsmaxReader",
    "Check",
    "Subject",
    "describe_checks",
    "plausibility",
    "validate",
]

AbsmaxReader = Callable[[Path], Mapping[str, tuple[float, float]]]
"""Given a statistics file, returns for each attention module the largest calibrated magnitudes of K and V."""

CHECKS: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    check_opens,
    check_layers_present,
    check_k_and_v_present,
    check_finite,
    check_positive,
    check_dtype_and_shape,
    check_bfloat16_representable,
    check_aliases_agree,
    check_mla_k_equals_v,
    check_targets,
    check_index,
    check_base_untouched,
    check_plausible,
)


def validate(directory: str | Path, read_absmax: AbsmaxReader | None = None) -> list[Check]:
    """Run every check that applies to the checkpoint in ``directory``.

    Args:
        directory: the checkpoint.
        read_absmax: how to read the statistics that lie in the folder ``fp8kv``; without it, or without them, the
            scales are not compared with what was calibrated.

    Returns:
        One entry per check that ran. A checkpoint that does not open gets that one entry alone.
    """
    try:
        checkpoint = open_checkpoint(directory)
        subject = Subject(
            checkpoint=checkpoint,
            facts=model_facts(checkpoint),
            scales=tuple(find_kv_scales(checkpoint)),
            manifest=read_manifest(checkpoint.path),
            absmax=None,
        )
    except CheckpointError as error:
        return [Check("opens", False, str(error))]
    unreadable = []
    statistics = checkpoint.path / SIDE_FOLDER / STATISTICS_FILE
    if read_absmax is not None and statistics.is_file():
        try:
            subject = replace(subject, absmax=read_absmax(statistics))
        except Fp8kvError as error:
            unreadable = [Check("plausible", False, str(error))]
    return [result for check in CHECKS for result in check(subject)] + unreadable


def describe_checks() -> list[tuple[str, str]]:
    """Return name and description of every check, for help texts."""
    return [(_name(check), (check.__doc__ or "").splitlines()[0]) for check in CHECKS]


def _name(check: Callable[[Subject], Iterator[Check]]) -> str:
    return check.__name__.removeprefix("check_").replace("_", "-")
