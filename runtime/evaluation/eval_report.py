"""The result of ``fp8kv eval``: what was run, what each arm reached, and whether that is what was expected.

An arm is one way to hold the KV cache: ``bf16`` is the cache as the model computes it, unquantised
(whatever the dtype of the run), ``fp8-unit`` is FP8 at scale 1.0, ``fp8`` is FP8 with the scales of
the checkpoint, ``emulate`` is the same numbers with the attention of ``bf16``. ``bf16`` is the
baseline of every comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement_eval import AgreementSection
from fp8kv.runtime.evaluation.arms import ARMS
from fp8kv.runtime.evaluation.eval_json import decode
from fp8kv.runtime.evaluation.gsm8k_section import Gsm8kSection
from fp8kv.runtime.evaluation.needle_eval import NeedleSection
from fp8kv.runtime.evaluation.perplexity_eval import PerplexitySection
from fp8kv.runtime.evaluation.tasks_eval import TasksSection

SCHEMA = 2


@dataclass(frozen=True)
class ArmRun:
    """How one arm ran.

    Attributes:
        cache_bytes_per_token: of all layers together.
        seconds: wall-clock time of what it was asked alone, beside no other arm.
    """

    cache_bytes_per_token: int
    seconds: float


@dataclass(frozen=True)
class Sections:
    """What was measured; None where it was not asked for.

    Attributes:
        gsm8k: exact match on word problems, and agreement on their reference answers.
        perplexity: of a text.
        agreement: with the baseline on a text, by position.
        needle: retrieval from long contexts.
        tasks: of lm-evaluation-harness.
    """

    gsm8k: Gsm8kSection | None = None
    perplexity: PerplexitySection | None = None
    agreement: AgreementSection | None = None
    needle: NeedleSection | None = None
    tasks: TasksSection | None = None

    def present(self) -> dict[str, Any]:
        """Return the sections that were asked for, by name."""
        return {name: section for name, section in vars(self).items() if section is not None}


@dataclass(frozen=True)
class ExpectationOutcome:
    """One threshold and what was found.

    Attributes:
        expectation: the threshold's key, e.g. ``max_kl``.
        arm: the arm that was held to it.
        measured: what was compared, e.g. ``GSM8K, strict-match``.
        threshold: what was expected.
        found: what was measured.
        is_met: whether it is within the threshold; a value that is not a number never is.
    """

    expectation: str
    arm: str
    measured: str
    threshold: float
    found: float
    is_met: bool


@dataclass(frozen=True)
class EvalReport:
    """A whole evaluation.

    Attributes:
        model: the checkpoint as the user named it.
        device: where the model ran, with its name, e.g. ``cuda (NVIDIA H200)``.
        backend: the attention backend, e.g. ``triton``.
        dtype: of the computation, e.g. ``bfloat16``.
        fp8_format: of the FP8 arms, e.g. ``e4m3fn``.
        arms: the arms, in the order of the run.
        sections: what was measured.
        expectations: what was expected of it; empty where nothing was.
        versions: version by distribution, e.g. ``{"fp8kv": "0.1.0"}``.
        seconds: wall-clock time of the whole run.

    Raises:
        EvaluationError: there is no arm or no section, an arm is unknown, or a section is over other arms.
    """

    model: str
    device: str
    backend: str
    dtype: str
    fp8_format: str
    arms: Mapping[str, ArmRun]
    sections: Sections
    expectations: tuple[ExpectationOutcome, ...]
    versions: Mapping[str, str]
    seconds: float

    def __post_init__(self) -> None:
        if not self.arms:
            raise EvaluationError(f"an evaluation needs an arm; known: {', '.join(ARMS)}")
        for name in self.arms:
            if name not in ARMS:
                raise EvaluationError(f"unknown arm {name!r}; known: {', '.join(ARMS)}")
        if not self.sections.present():
            raise EvaluationError("the report holds no section: nothing was measured")
        for name, section in self.sections.present().items():
            if list(section.arms) != list(self.arms):
                raise EvaluationError(
                    f"{name} is over the arms {', '.join(section.arms)}, the report over {', '.join(self.arms)}"
                )

    @property
    def is_as_expected(self) -> bool:
        """Whether every expectation is met."""
        return all(outcome.is_met for outcome in self.expectations)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, schema 2; :meth:`from_json` is its inverse."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalReport:
        """Build a report from :meth:`to_json`'s form.

        Raises:
            EvaluationError: the schema is unknown, or a key is missing, unknown or malformed.
        """
        if not isinstance(data, Mapping):
            raise EvaluationError(f"the report must be a JSON object, not {data!r}")
        schema = data.get("schema")
        if schema != SCHEMA:
            raise EvaluationError(
                f"the report has schema {schema!r}, and this version of fp8kv reads {SCHEMA}; "
                "it is another file, or of another version"
            )
        return decode(cls, {key: value for key, value in data.items() if key != "schema"}, "report")
