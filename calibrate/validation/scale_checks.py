"""Checks of the scales themselves: complete, sound, and stored as engines read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.formats.kv_names import FoundScale
from fp8kv.calibrate.overlay.manifest import Manifest
from fp8kv.calibrate.scales import is_bfloat16_representable


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check, as in :data:`CHECKS`; checks of a target have its name behind it.
        passed: False is a finding.
        detail: what was found, or what was checked.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Subject:
    """What the checks look at.

    Attributes:
        checkpoint: the checkpoint, opened.
        facts: its facts.
        scales: all KV scales in it.
        manifest: fp8kv's record; None for a foreign checkpoint.
        absmax: attention module -> largest calibrated magnitudes of K and V; None if nobody knows.
    """

    checkpoint: Checkpoint
    facts: ModelFacts
    scales: tuple[FoundScale, ...]
    manifest: Manifest | None
    absmax: Mapping[str, tuple[float, float]] | None

    @property
    def granularity(self) -> str:
        """``head`` if any scale has more than one value."""
        return "head" if any(scale.value.numel() > 1 for scale in self.scales) else "tensor"

    def of(self, layer: str, stream: str) -> list[FoundScale]:
        """Return the scales of one stream of one layer, in all their spellings."""
        return [found for found in self.scales if found.layer == layer and stream in found.stream]


def judge(name: str, problems: Sequence[str], summary: str) -> Check:
    """Return the result of the check ``name``: its first problem, or ``summary`` if there is none."""
    if not problems:
        return Check(name, True, summary)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(name, False, problems[0] + more)


def show_scale(found: FoundScale) -> str:
    """Return the value of a scale for a sentence."""
    values = [f"{value:g}" for value in found.value.tolist()]
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"


def check_opens(subject: Subject) -> Iterator[Check]:
    """Config, index and shards can be read, and are those of a model that fp8kv knows."""
    facts = subject.facts
    yield Check(
        "opens",
        True,
        f"{facts.architecture}, {facts.attention}, {len(facts.layers)} layers with a cache",
    )


def check_layers_present(subject: Subject) -> Iterator[Check]:
    """Every layer that owns a KV cache has a scale."""
    held = {found.layer for found in subject.scales}
    missing = [layer.name for layer in subject.facts.layers if layer.name not in held]
    problems = [f"{name} has no scale" for name in missing]
    yield judge("layers-present", problems, f"{len(subject.facts.layers)} layers")


def check_k_and_v_present(subject: Subject) -> Iterator[Check]:
    """A layer that has a scale has one for K and one for V."""
    problems = []
    for layer in dict.fromkeys(found.layer for found in subject.scales):
        for stream in "kv":
            if not any(found.stream == stream for found in subject.of(layer, stream)):
                problems.append(
                    f"{layer} has no {stream}_scale; engines disagree on what that means"
                )
    yield judge("k-and-v-present", problems, "K and V in every layer that has scales")


def check_finite(subject: Subject) -> Iterator[Check]:
    """No scale is NaN or infinite."""
    problems = [
        f"{found.tensor} is {show_scale(found)}"
        for found in subject.scales
        if not found.value.isfinite().all()
    ]
    yield judge("finite", problems, f"{len(subject.scales)} tensors")


def check_positive(subject: Subject) -> Iterator[Check]:
    """Every scale is above zero."""
    problems = [
        f"{found.tensor} is {show_scale(found)}"
        for found in subject.scales
        if not (found.value > 0).all() and not found.value.isnan().any()
    ]
    yield judge("positive", problems, f"{len(subject.scales)} tensors")


def check_dtype_and_shape(subject: Subject) -> Iterator[Check]:
    """A scale is a float32 tensor of one element, or of one per KV head."""
    # Engines also read half precision; fp8kv itself always writes float32.
    dtypes = ("F32",) if subject.manifest else ("F32", "BF16", "F16")
    heads = subject.facts.num_kv_heads
    problems = []
    for found in subject.scales:
        entry = subject.checkpoint.entry(found.tensor)
        if entry.dtype not in dtypes:
            problems.append(f"{found.tensor} is {entry.dtype}, not {' or '.join(dtypes)}")
        count = found.value.numel()
        if count != 1 and (count != heads or subject.facts.attention == "mla"):
            problems.append(
                f"{found.tensor} has shape {list(entry.shape)}: neither one value nor one per head"
            )
    yield judge(
        "dtype-and-shape", problems, f"{len(subject.scales)} tensors, per {subject.granularity}"
    )


def check_bfloat16_representable(subject: Subject) -> Iterator[Check]:
    """Every scale survives bfloat16, in which some engines hold it."""
    problems = [
        f"{found.tensor} is {show_scale(found)}, which engines that hold it in bfloat16 read as another value"
        for found in subject.scales
        if not all(
            is_bfloat16_representable(value)
            for value in found.value.tolist()
            if math.isfinite(value)
        )
    ]
    yield judge("bfloat16-representable", problems, f"{len(subject.scales)} tensors")


def check_aliases_agree(subject: Subject) -> Iterator[Check]:
    """Where a layer's scale is stored under several names, all hold the same value."""
    problems = []
    for layer in dict.fromkeys(found.layer for found in subject.scales):
        for stream in "kv":
            same = subject.of(layer, stream)
            problems += [
                f"{same[0].tensor} is {show_scale(same[0])} and {other.tensor} is {show_scale(other)}"
                for other in same[1:]
                if not same[0].value.equal(other.value)
            ]
    yield judge("aliases-agree", problems, "no name contradicts another")


def check_mla_k_equals_v(subject: Subject) -> Iterator[Check]:
    """An MLA layer caches one row of which V is a view, so its two scales are equal."""
    if subject.facts.attention != "mla":
        return
    problems = []
    for layer in dict.fromkeys(found.layer for found in subject.scales):
        for k, v in zip(subject.of(layer, "k"), subject.of(layer, "v"), strict=False):
            if not k.value.equal(v.value):
                problems.append(f"{layer} has k_scale {show_scale(k)} and v_scale {show_scale(v)}")
    yield judge("mla-k-equals-v", problems, "k_scale = v_scale in every layer")
