"""The GSM8K section of an evaluation's report: what each arm reached, and the paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement import AgreementSummary
from fp8kv.runtime.evaluation.arms import BASELINE
from fp8kv.runtime.evaluation.gsm8k import Score
from fp8kv.runtime.evaluation.paired import Accuracy, PairedComparison, compare


@dataclass(frozen=True)
class Gsm8kArm:
    """What one arm reached.

    Attributes:
        strict: exact match under ``strict-match``.
        flexible: exact match under ``flexible-extract``.
        agreement: the teacher-forced comparison with the baseline on the reference answers (the
            baseline's own has KL 0); None if the run had no baseline to compare with.
        seconds: wall-clock time of the answers.
    """

    strict: Accuracy
    flexible: Accuracy
    agreement: AgreementSummary | None
    seconds: float


@dataclass(frozen=True)
class Gsm8kComparison:
    """One arm (first) against the baseline (second), per filter; a loss is a negative difference.

    Attributes:
        strict: the comparison of the ``strict-match`` outcomes.
        flexible: the comparison of the ``flexible-extract`` outcomes.
    """

    strict: PairedComparison
    flexible: PairedComparison


@dataclass(frozen=True)
class Gsm8kSection:
    """GSM8K, or problems in its format.

    Attributes:
        data: the problems' file as the user named it.
        shots: the file that the shots were drawn from, likewise; None where they are the problems themselves.
        protocol: :data:`fp8kv.runtime.evaluation.gsm8k.PROTOCOL`.
        protocol_digest: :func:`fp8kv.runtime.evaluation.gsm8k.protocol_digest` of this run.
        n: problems.
        num_fewshot: shots per prompt.
        max_new_tokens: generation limit.
        arms: by arm.
        comparisons: with the baseline, by arm.
    """

    data: str
    shots: str | None
    protocol: str
    protocol_digest: str
    n: int
    num_fewshot: int
    max_new_tokens: int
    arms: Mapping[str, Gsm8kArm]
    comparisons: Mapping[str, Gsm8kComparison]

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            _check_count(f"arm {name!r}", self.n, arm.strict.n, arm.flexible.n)
        for name, pair in self.comparisons.items():
            if name == BASELINE or name not in self.arms or BASELINE not in self.arms:
                raise EvaluationError(
                    f"there is a comparison of {name!r} with {BASELINE!r}, which needs both as "
                    f"different arms; the arms are {', '.join(self.arms)}"
                )
            _check_count(f"the comparison of {name!r}", self.n, pair.strict.n, pair.flexible.n)


def compare_with_baseline(scores: Mapping[str, Sequence[Score]]) -> dict[str, Gsm8kComparison]:
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
        name: Gsm8kComparison(
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
