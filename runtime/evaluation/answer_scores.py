"""How likely a model holds given answers: log-probability and rank of each of their tokens, by teacher forcing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement import token_nll
from fp8kv.runtime.requests import Completion
from fp8kv.runtime.sampling import SamplingParameters

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of prompts with those of the answers that follow them, at least one token each."""

# float64 elements of the logits of one chunk: 16 MiB
_CHUNK_ELEMENTS = 1 << 21


class MeasuredModel(Protocol):
    """What a measurement asks of a model; :class:`fp8kv.runtime.llm.LLM` is one.

    Attributes:
        tokenizer: of transformers.
        max_positions: tokens of a prompt and its answer together; None where the model names no limit.
    """

    tokenizer: Any

    @property
    def max_positions(self) -> int | None:
        """Tokens of a prompt and its answer together; None where the model names no limit."""

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        parameters: SamplingParameters | Sequence[SamplingParameters],
    ) -> list[Completion]:
        """Continue every prompt; return in the order of ``prompts``."""
        ...

    def teacher_forced(self, sequences: Sequences) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a sequence and logits ``[answer tokens, vocabulary]`` that predict its answer.

        The logits of an answer may come in pieces, from its first token to its last.
        """
        ...


@dataclass(frozen=True)
class AnswerScore:
    """What a model holds of an answer that it was given.

    Attributes:
        logprobs: natural log-probability of each token, given the prompt and the tokens before it.
        ranks: how many tokens are likelier than each; 0 for what greedy decoding would choose.
    """

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]

    @property
    def logprob(self) -> float:
        """Natural log-probability of the whole answer."""
        return math.fsum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give this answer."""
        return not any(self.ranks)


def score_answers(llm: MeasuredModel, sequences: Sequences) -> Iterator[tuple[int, AnswerScore]]:
    """Yield the number of each sequence and the score of its answer, as they become known.

    Softmax is computed in float64 and in chunks, so memory does not grow with an answer's length. Equally likely
    tokens rank by their ids, as greedy decoding takes the lowest.

    Raises:
        EvaluationError: a log-probability is not finite.
    """
    parts: dict[int, AnswerScore] = {}
    for number, logits in llm.teacher_forced(sequences):
        answer = sequences[number][1]
        before = parts.pop(number, AnswerScore((), ()))
        first = len(before.ranks)
        tokens = torch.tensor(answer[first : first + len(logits)], device=logits.device)
        logprobs, ranks = _score(logits, tokens)
        score = AnswerScore((*before.logprobs, *logprobs), (*before.ranks, *ranks))
        if len(score.ranks) < len(answer):
            parts[number] = score
            continue
        if not math.isfinite(score.logprob):
            raise EvaluationError(
                f"the log-probability of an answer of {len(answer)} tokens is {score.logprob}: the logits hold NaN "
                "or infinity, so look for non-finite values in the cache"
            )
        yield number, score


def _score(logits: Tensor, tokens: Tensor) -> tuple[list[float], list[int]]:
    logprobs: list[Tensor] = []
    ranks: list[Tensor] = []
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    ids = torch.arange(logits.shape[1], device=logits.device)
    for start in range(0, len(tokens), rows):
        exact = logits[start : start + rows].double()
        targets = tokens[start : start + rows]
        logprobs.append(-token_nll(exact.log_softmax(-1), targets))
        own = exact.gather(1, targets[:, None])
        likelier = (exact > own) | ((exact == own) & (ids < targets[:, None]))
        ranks.append(likelier.sum(1))
    # read back once: each time the host waits for the device
    return torch.cat(logprobs).tolist(), torch.cat(ranks).tolist()
