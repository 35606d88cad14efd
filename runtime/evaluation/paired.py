"""Compare two cache arms on the same problems: exact McNemar, bootstrap, Wilson.

Two arms that answer the same questions agree on almost all of them. Only the discordant questions
carry information about the difference, so a paired comparison sees smaller differences than two
separate accuracies with their intervals do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fp8kv.recipes.errors import EvaluationError

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
BOOTSTRAP_SEED = 1234

# Resampled values held at a time: 8 MiB of indices and as much of values.
_MAX_DRAWS = 1 << 20


@dataclass(frozen=True)
class PairedComparison:
    """Two arms on the same problems.

    Attributes:
        n: problems.
        both_right: problems that both arms answer rightly.
        only_a: problems that only the first arm answers rightly.
        only_b: problems that only the second arm answers rightly.
        neither: problems that both arms get wrong.
        difference: accuracy of the first arm minus accuracy of the second.
        ci_low: lower end of the bootstrap interval of the difference.
        ci_high: upper end of it.
        p_value: two-sided exact McNemar p-value, in (0, 1].
    """

    n: int
    both_right: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Attributes:
        right: answered rightly.
        n: asked.
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
        """Count the outcomes.

        Raises:
            EvaluationError: there are none.
        """
        if not outcomes:
            raise EvaluationError("there is no accuracy to report: nothing was asked")
        right = sum(map(bool, outcomes))
        low, high = wilson_interval(right, len(outcomes))
        return cls(right, len(outcomes), right / len(outcomes), low, high)


def compare(a: Sequence[bool], b: Sequence[bool]) -> PairedComparison:
    """Compare two arms, given whether each answered each problem rightly.

    Args:
        a: the outcomes of the first arm, one per problem.
        b: the outcomes of the second arm, in the same order of problems.

    Raises:
        EvaluationError: the outcomes differ in number, or there are none.
    """
    if len(a) != len(b):
        raise EvaluationError(
            f"the arms answered {len(a)} and {len(b)} problems; "
            "a paired comparison needs the same problems in the same order"
        )
    if len(a) == 0:
        raise EvaluationError("there is nothing to compare: no problem was evaluated")
    pairs = [(bool(first), bool(second)) for first, second in zip(a, b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    low, high = bootstrap_interval([first - second for first, second in pairs])
    return PairedComparison(
        n=len(pairs),
        both_right=pairs.count((True, True)),
        only_a=only_a,
        only_b=only_b,
        neither=pairs.count((False, False)),
        difference=(only_a - only_b) / len(pairs),
        ci_low=low,
        ci_high=high,
        p_value=mcnemar_p_value(only_a, only_b),
    )


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p-value of McNemar's test.

    Without a difference between the arms, each discordant pair falls to either side with
    probability 1/2. The p-value is twice the binomial tail of the smaller count, at most 1,
    computed in whole numbers. No discordant pair gives 1. A value below the smallest positive float
    is returned as that float, never as 0.

    Reference: Q. McNemar, "Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12 (1947) 153-157; here with the exact binomial
    distribution in place of the chi-squared approximation.

    Args:
        only_a: pairs that only the first arm gets right.
        only_b: pairs that only the second arm gets right.

    Raises:
        EvaluationError: a count is negative.
    """
    if only_a < 0 or only_b < 0:
        raise EvaluationError(f"discordant pairs cannot be negative: {only_a} and {only_b}")
    num_discordant = only_a + only_b
    term = tail = 1
    for successes in range(min(only_a, only_b)):
        # term is the binomial coefficient (num_discordant over successes + 1), always whole.
        term = term * (num_discordant - successes) // (successes + 1)
        tail += term
    p_value = 2 * tail / (1 << num_discordant)
    return min(max(p_value, math.ulp(0.0)), 1.0)


def bootstrap_interval(
    differences: Sequence[float] | npt.NDArray[np.float64],
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of paired differences.

    Problems are resampled, so both arms' outcomes of one problem stay together. Memory does not grow
    with the number of resamples times problems: at most 16 MiB, or 16 bytes a problem if more.

    Where hardly any pair is discordant the interval is too narrow, and where none is it has no
    width: read it together with the counts and the p-value.

    Reference: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7
    (1979) 1-26.

    Args:
        differences: first arm minus second, one per problem [problems].
        num_resamples: bootstrap samples, each of as many problems as were given.
        confidence: coverage aimed at, between 0 and 1.
        seed: of ``numpy.random.default_rng``; the same seed gives the same interval.

    Raises:
        EvaluationError: there are no differences, one is not finite, or an option is out of range.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise EvaluationError("a bootstrap interval needs one difference per problem, at least one")
    if not np.isfinite(values).all():
        raise EvaluationError(
            f"the difference of problem {int(np.argmin(np.isfinite(values)))} (from 0) is not finite"
        )
    if num_resamples < 1:
        raise EvaluationError(f"the number of resamples is {num_resamples}; give 1 or more")
    tail = _tail(confidence)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, _MAX_DRAWS // values.size)
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        chosen = generator.integers(values.size, size=(stop - start, values.size))
        means[start:stop] = values[chosen].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(
    successes: int, trials: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at 1.

    Reference: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927) 209-212.

    Args:
        successes: problems answered rightly.
        trials: problems.
        confidence: coverage aimed at, between 0 and 1.

    Raises:
        EvaluationError: there are no trials, or successes are negative or more than the trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise EvaluationError(f"{successes} right of {trials} is not a proportion")
    z_squared = NormalDist().inv_cdf(1 - _tail(confidence)) ** 2
    proportion = successes / trials
    shrink = 1 + z_squared / trials
    centre = (proportion + z_squared / (2 * trials)) / shrink
    variance = proportion * (1 - proportion) / trials + z_squared / (4 * trials**2)
    half_width = math.sqrt(z_squared * variance) / shrink
    # At 0 and 1 the end is exact, which floating point would miss by a rounding.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == trials else centre + half_width
    return low, high


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise EvaluationError(f"the confidence is {confidence}; give a number between 0 and 1")
    return (1 - confidence) / 2
