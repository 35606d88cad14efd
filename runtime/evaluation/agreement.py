"""Compare the logits of a cache arm with the unquantised cache's, teacher-forced on a reference.

Exact match on a few hundred problems cannot see a small disturbance of the cache; the probabilities
of every token of the reference answers can.

Softmax and divergence are computed in float64, whatever the logits are. In float32 the rounding of
the normaliser alone moves the divergence of a token by 1e-7 to 1e-6, either way, and a good scale's
divergence is of that size (3e-6 for a scale that loses nothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.recipes.errors import EvaluationError

# float64 elements of the logits of one chunk: 16 MiB. Several tensors of this size live at a time.
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class AgreementSummary:
    """Means over the reference tokens.

    Attributes:
        num_tokens: reference tokens compared.
        nll: mean negative log likelihood of the reference tokens, in nats.
        top1_reference: share of tokens where the arm's most likely token is the reference token.
        top1_baseline: share of tokens where it is the baseline's most likely token.
        kl: mean of KL(baseline || arm), in nats.
        kl_max: the largest KL of any token, in nats.
    """

    num_tokens: int
    nll: float
    top1_reference: float
    top1_baseline: float
    kl: float
    kl_max: float


@dataclass(frozen=True)
class Agreement:
    """Sums over reference tokens, which merge over batches, shards and ranks in any order.

    Attributes:
        num_tokens: reference tokens compared.
        nll_sum: negative log likelihood of the reference tokens, in nats.
        top1_match_reference: tokens where the arm's most likely token is the reference token.
        top1_match_baseline: tokens where it is the baseline's most likely token.
        kl_sum: KL(baseline || arm) over the tokens, in nats.
        kl_max: the largest KL of any token, in nats.
    """

    num_tokens: int = 0
    nll_sum: float = 0.0
    top1_match_reference: int = 0
    top1_match_baseline: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0

    def merge(self, other: Agreement) -> Agreement:
        """Return the agreement over both sets of tokens; ``Agreement()`` is the neutral element."""
        return Agreement(
            num_tokens=self.num_tokens + other.num_tokens,
            nll_sum=self.nll_sum + other.nll_sum,
            top1_match_reference=self.top1_match_reference + other.top1_match_reference,
            top1_match_baseline=self.top1_match_baseline + other.top1_match_baseline,
            kl_sum=self.kl_sum + other.kl_sum,
            kl_max=max(self.kl_max, other.kl_max),
        )

    def summary(self) -> AgreementSummary:
        """Return the means.

        Raises:
            EvaluationError: no token was compared.
        """
        if self.num_tokens == 0:
            raise EvaluationError("no reference token was compared, so there are no means")
        return AgreementSummary(
            num_tokens=self.num_tokens,
            nll=self.nll_sum / self.num_tokens,
            top1_reference=self.top1_match_reference / self.num_tokens,
            top1_baseline=self.top1_match_baseline / self.num_tokens,
            kl=self.kl_sum / self.num_tokens,
            kl_max=self.kl_max,
        )


def measure_agreement(
    logits: Tensor, baseline_logits: Tensor, reference_tokens: Tensor
) -> Agreement:
    """Compare an arm's logits with the baseline's on reference tokens.

    Tokens are worked off in chunks, so that the temporaries take about 120 MiB however many tokens are
    given (measured on a CPU with a vocabulary of 151,936). Ties for the most likely
    token are resolved as ``torch.argmax`` does. A KL that rounding made negative (by 1e-15 or so) is
    counted as 0. The baseline compared with itself gives KL 0 and full agreement with the baseline.

    Args:
        logits: the arm's logits [tokens, vocabulary], floating; row i predicts reference token i.
        baseline_logits: the unquantised cache's logits for the same rows [tokens, vocabulary].
        reference_tokens: the token ids that follow [tokens], integers.

    Returns:
        The sums over these tokens.

    Raises:
        EvaluationError: shapes or types disagree, a token id is outside the vocabulary, or logits
            are not finite where the result depends on them.
    """
    _check_arguments(logits, baseline_logits, reference_tokens)
    num_tokens, vocabulary = logits.shape
    rows = max(1, _CHUNK_ELEMENTS // vocabulary)
    result = Agreement()
    for start in range(0, num_tokens, rows):
        chunk = slice(start, start + rows)
        part = _measure_chunk(logits[chunk], baseline_logits[chunk], reference_tokens[chunk])
        if not math.isfinite(part.nll_sum + part.kl_sum):
            raise EvaluationError(
                f"the NLL or KL of reference tokens {start} to {start + part.num_tokens - 1} is not "
                "finite: the logits hold NaN or Inf, so look for non-finite values in the cache"
            )
        result = result.merge(part)
    return result


def token_nll(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Return the negative log likelihood of each token.

    Args:
        log_probabilities: normalised, in nats [tokens, vocabulary].
        tokens: token ids, int64 [tokens].

    Returns:
        In nats [tokens].
    """
    return -log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_kl(baseline: Tensor, arm: Tensor) -> Tensor:
    """Return KL(baseline || arm) of each token, at least 0.

    A token that the baseline holds impossible adds nothing; one that only the arm holds impossible
    makes the divergence infinite.

    Args:
        baseline: normalised log probabilities, in nats [tokens, vocabulary].
        arm: the same of the arm [tokens, vocabulary].

    Returns:
        In nats [tokens].
    """
    impossible = baseline == -math.inf
    terms = (baseline.exp() * (baseline - arm)).masked_fill(impossible, 0.0)
    # Exact arithmetic gives 0 or more; the sum of rounded terms can fall below by their rounding.
    return terms.sum(dim=-1).clamp_min(0.0)


def _measure_chunk(logits: Tensor, baseline_logits: Tensor, reference_tokens: Tensor) -> Agreement:
    tokens = reference_tokens.to(logits.device, torch.int64)
    baseline_logits = baseline_logits.to(logits.device)
    arm = torch.log_softmax(logits.to(torch.float64), dim=-1)
    baseline = torch.log_softmax(baseline_logits.to(torch.float64), dim=-1)
    best = logits.argmax(dim=-1)
    kl = token_kl(baseline, arm)
    return Agreement(
        num_tokens=len(tokens),
        nll_sum=float(token_nll(arm, tokens).sum()),
        top1_match_reference=int((best == tokens).sum()),
        top1_match_baseline=int((best == baseline_logits.argmax(dim=-1)).sum()),
        kl_sum=float(kl.sum()),
        kl_max=float(kl.max()),
    )


def _check_arguments(logits: Tensor, baseline_logits: Tensor, reference_tokens: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.shape != baseline_logits.shape:
        raise EvaluationError(
            f"logits of shape {list(logits.shape)} and baseline logits of shape "
            f"{list(baseline_logits.shape)}; both must be [tokens, vocabulary]"
        )
    if not (logits.is_floating_point() and baseline_logits.is_floating_point()):
        raise EvaluationError(
            f"logits must be floating, not {logits.dtype} and {baseline_logits.dtype}"
        )
    if reference_tokens.shape != logits.shape[:1]:
        raise EvaluationError(
            f"{list(reference_tokens.shape)} reference tokens for {logits.shape[0]} rows of logits; "
            "row i must predict reference token i"
        )
    if reference_tokens.is_floating_point() or reference_tokens.dtype == torch.bool:
        raise EvaluationError(f"reference tokens must be integers, not {reference_tokens.dtype}")
    if reference_tokens.numel() == 0:
        return
    smallest, largest = int(reference_tokens.min()), int(reference_tokens.max())
    if smallest < 0 or largest >= logits.shape[1]:
        raise EvaluationError(
            f"reference tokens go from {smallest} to {largest}, outside the model's vocabulary of "
            f"{logits.shape[1]}; the tokenizer does not belong to this model"
        )
