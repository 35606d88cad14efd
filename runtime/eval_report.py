"""The result of ``fp8kv eval``: what was run, what each arm reached, and the paired comparisons.

An arm is one way to hold the KV cache: ``bf16`` is the cache as the model computes it, unquantised
(whatever the dtype of the run), ``fp8-unit`` is FP8 at scale 1.0, ``fp8`` is FP8 with the scales of
the checkpoint. ``bf16`` is the baseline of every comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.agreement import AgreementSummary
from fp8kv.runtime.gsm8k import Score
from fp8kv.runtime.paired import PairedComparison, compare, wilson_interval

SCHEMA = 1
BASELINE = "bf16"
ARMS = ("bf16", "fp8-unit", "fp8")


@dataclass(frozen=True)
class Accuracy:
    """Exact match of one arm under one filter.

    Attributes:
        right: problems answered rightly.
        n: problems.
        value: ``right / n``.
        ci_low: lower end of the 95 % Wilson interval.
        ci_high: upper end of it.
    """

    right: int
    n: int
    value: float
    ci_low: float
    ci_high: float

    @classmethod
    def from_outcomes(cls, outcomes: Sequence[bool]) -> Accuracy:
        """Count the outcomes, one per problem.

        Raises:
            EvaluationError: there are none.
        """
        if not outcomes:
            raise EvaluationError("there is no accuracy to report: no problem was evaluated")
        right = sum(map(bool, outcomes))
        low, high = wilson_interval(right, len(outcomes))
        return cls(right, len(outcomes), right / len(outcomes), low, high)


@dataclass(frozen=True)
class ArmResult:
    """What one arm reached.

    Attributes:
        strict: exact match under ``strict-match``.
        flexible: exact match under ``flexible-extract``.
        agreement: the teacher-forced comparison with the baseline on the reference answers (the
            baseline's own has KL 0); None if the run had no baseline to compare with.
        seconds: wall-clock time of the arm.
    """

    strict: Accuracy
    flexible: Accuracy
    agreement: AgreementSummary | None
    seconds: float

    @classmethod
    def from_scores(
        cls, scores: Sequence[Score], agreement: AgreementSummary | None, seconds: float
    ) -> ArmResult:
        """Summarise the scores of one arm, one per problem.

        Raises:
            EvaluationError: there are no scores.
        """
        return cls(
            strict=Accuracy.from_outcomes([score.strict for score in scores]),
            flexible=Accuracy.from_outcomes([score.flexible for score in scores]),
            agreement=agreement,
            seconds=seconds,
        )


@dataclass(frozen=True)
class ArmComparison:
    """One arm (first) against the baseline (second), per filter; a loss is a negative difference.

    Attributes:
        strict: the comparison of the ``strict-match`` outcomes.
        flexible: the comparison of the ``flexible-extract`` outcomes.
    """

    strict: PairedComparison
    flexible: PairedComparison


@dataclass(frozen=True)
class EvalReport:
    """A whole evaluation.

    Attributes:
        model: the checkpoint as the user named it.
        data: the problems' file, likewise.
        shots: the file that the shots were drawn from; None without shots.
        protocol: :data:`fp8kv.runtime.gsm8k.PROTOCOL`.
        protocol_digest: :func:`fp8kv.runtime.gsm8k.protocol_digest` of this run.
        n: problems.
        num_fewshot: shots per prompt.
        max_new_tokens: generation limit.
        device: where the model ran, with its name, e.g. ``cuda (NVIDIA H200)``.
        dtype: of the computation, e.g. ``bfloat16``.
        fp8_format: of the FP8 arms, e.g. ``e4m3fn``.
        arms: results by arm, in the order of the run.
        comparisons: comparisons with the baseline, by arm; see :func:`compare_with_baseline`.
        versions: version by distribution, e.g. ``{"fp8kv": "0.1.0"}``.
        seconds: wall-clock time of the whole run.

    Raises:
        EvaluationError: there is no arm, an arm or comparison is over another number of problems,
            or a comparison lacks its arm or the baseline.
    """

    model: str
    data: str
    shots: str | None
    protocol: str
    protocol_digest: str
    n: int
    num_fewshot: int
    max_new_tokens: int
    device: str
    dtype: str
    fp8_format: str
    arms: Mapping[str, ArmResult]
    comparisons: Mapping[str, ArmComparison]
    versions: Mapping[str, str]
    seconds: float

    def __post_init__(self) -> None:
        if not self.arms:
            raise EvaluationError(f"an evaluation needs an arm; known: {', '.join(ARMS)}")
        for name, arm in self.arms.items():
            if name not in ARMS:
                raise EvaluationError(f"unknown arm {name!r}; known: {', '.join(ARMS)}")
            _check_count(f"arm {name!r}", self.n, arm.strict.n, arm.flexible.n)
        for name, pair in self.comparisons.items():
            if name == BASELINE or name not in self.arms or BASELINE not in self.arms:
                raise EvaluationError(
                    f"there is a comparison of {name!r} with {BASELINE!r}, which needs both as "
                    f"different arms; the arms are {', '.join(self.arms)}"
                )
            _check_count(f"the comparison of {name!r}", self.n, pair.strict.n, pair.flexible.n)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, schema 1; :meth:`from_json` is its inverse."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalReport:
        """Build a report from :meth:`to_json`'s form.

        Raises:
            EvaluationError: the schema is unknown, or a key is missing, unknown or malformed.
        """
        schema = _mapping(data, "the report").get("schema")
        if schema != SCHEMA:
            raise EvaluationError(
                f"the report has schema {schema!r}, and this version of fp8kv reads {SCHEMA}; "
                "it is another file, or of another version"
            )
        content = {key: value for key, value in data.items() if key != "schema"}
        report: EvalReport = _decode(cls, content, "report")
        return report


def compare_with_baseline(scores: Mapping[str, Sequence[Score]]) -> dict[str, ArmComparison]:
    """Compare every other arm with the baseline, if it was run; otherwise return no comparison.

    Args:
        scores: by arm, one per problem, in the same order of problems.

    Raises:
        EvaluationError: arms differ in their number of problems, or there are no problems.
    """
    if BASELINE not in scores:
        return {}
    baseline = scores[BASELINE]
    return {
        name: ArmComparison(
            strict=compare([s.strict for s in arm], [s.strict for s in baseline]),
            flexible=compare([s.flexible for s in arm], [s.flexible for s in baseline]),
        )
        for name, arm in scores.items()
        if name != BASELINE
    }


def _check_count(what: str, expected: int, *found: int) -> None:
    for count in found:
        if count != expected:
            raise EvaluationError(f"{what} is over {count} problems, the report over {expected}")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Build a value of an annotated type from its JSON form, refusing every deviation."""
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, _mapping(value, where), where)
    if get_origin(kind) is Mapping:
        _, entry_kind = get_args(kind)
        entries = _mapping(value, where)
        return {key: _decode(entry_kind, entry, f"{where}.{key}") for key, entry in entries.items()}
    if isinstance(kind, UnionType):
        present, _ = get_args(kind)
        return None if value is None else _decode(present, value, where)
    # JSON writers may drop the fraction of a whole number. A bool is an int to Python, not to us.
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise EvaluationError(f"{where} must be {kind.__name__}, not {value!r}")
    return value


def _decode_record(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    kinds = get_type_hints(kind)
    for key in kinds:
        if key not in value:
            raise EvaluationError(f"{where} lacks {key!r}; the report is incomplete")
    for key in value:
        if key not in kinds:
            raise EvaluationError(f"{where} has an unknown key {key!r}; known: {', '.join(kinds)}")
    return kind(**{key: _decode(kinds[key], value[key], f"{where}.{key}") for key in kinds})


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise EvaluationError(f"{where} must be a JSON object, not {value!r}")
    return value
