"""What a model says of given texts: the log-probability of every token, and the logits that predict an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.recipes.errors import EvaluationError, RequestError
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.packed_logits import LogitsRunner, packed_logits
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.sampling import NOT_FINITE


@dataclass(frozen=True)
class TokenScore:
    """What the model says of a token, given those before it.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        is_greedy: whether it is the likeliest; of equals that is the one with the lowest id.
    """

    token_id: int
    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Reads texts with a model, many at a time, on the pages that the engine generates with.

    Attributes:
        runner: of the model.
        allocator: of its pages.
        limits: of the model and of a forward pass.
        max_rows: rows of logits that are held at one time.
        device: where the model runs.
    """

    runner: LogitsRunner
    allocator: PageAllocator
    limits: EngineLimits
    max_rows: int
    device: torch.device | str

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[TokenScore]]:
        """Return for every prompt the score of each token but the first.

        Raises:
            RequestError: a prompt is empty or can never fit, or there are too few free pages now.
            EvaluationError: the logits hold NaN or infinity.
        """
        for prompt in prompts:
            self._check(prompt)
        scores: list[list[TokenScore]] = [[] for _ in prompts]
        # the last token is scored by the logits of the one before it
        for number, logits in self._logits((prompt[:-1], 0) for prompt in prompts):
            start = len(scores[number]) + 1
            found = _score(logits, prompts[number][start : start + len(logits)])
            if found is None:
                raise EvaluationError(f"prompt {number} of {len(prompts)}: {NOT_FINITE}")
            scores[number] += found
        return scores

    def teacher_forced(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Return an iterator of the logits that predict the tokens of each answer behind its prompt, in order.

        An answer of more than ``max_rows`` tokens comes in pieces of so many, the last one shorter; the cuts are the
        same whatever else is there. Whoever closes the iterator frees its pages.

        Args:
            sequences: the token ids of prompt and answer, at least one of each.

        Returns:
            The number of a sequence and ``[answer tokens, vocabulary]``, float32, on the device, again and again.

        Raises:
            RequestError: at once if a sequence lacks a prompt or an answer, or can never fit; from the iterator if there
                are too few free pages now.
        """
        for number, (prompt, answer) in enumerate(sequences):
            if not prompt or not answer:
                raise RequestError(
                    f"sequence {number} has {len(prompt)} tokens of prompt and {len(answer)} of answer: "
                    "give at least one of each"
                )
            self._check([*prompt, *answer])
        return self._pieces(sequences)

    def _pieces(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Tensor]]:
        pieces: list[Tensor] = []
        num_sent = 0
        # the last token of an answer predicts nothing that is asked for
        texts = (([*prompt, *answer[:-1]], len(prompt) - 1) for prompt, answer in sequences)
        for number, logits in self._logits(texts):
            length = len(sequences[number][1])
            while len(logits):
                wanted = min(self.max_rows, length - num_sent)
                pieces.append(logits[: wanted - sum(map(len, pieces))])
                logits = logits[len(pieces[-1]) :]
                if sum(map(len, pieces)) == wanted:
                    # a copy, so that whoever keeps it does not keep the whole pass
                    yield number, torch.cat(pieces).float()
                    pieces.clear()
                    num_sent = (num_sent + wanted) % length

    def _check(self, token_ids: Sequence[int]) -> None:
        capacity = self.allocator.num_pages * self.allocator.page_size
        # the last token is predicted and not read, so that it needs no place
        self.limits.check(token_ids[:-1] or token_ids, 0, capacity)
        self.limits.check(token_ids[-1:], 0, capacity)

    def _logits(self, texts: Iterable[tuple[Sequence[int], int]]) -> Iterator[tuple[int, Tensor]]:
        return packed_logits(
            self.runner,
            self.allocator,
            texts,
            max_tokens=self.limits.max_batch_tokens,
            max_rows=self.max_rows,
            device=self.device,
        )


def _score(logits: Tensor, token_ids: Sequence[int]) -> list[TokenScore] | None:
    """Return what ``logits [rows, vocabulary]`` say of one token each, None if they are no numbers."""
    logits = logits.float()
    targets = torch.tensor(token_ids).to(logits.device)
    normaliser = logits.logsumexp(-1)
    if not normaliser.isfinite().all():
        return None
    logprobs = logits.gather(1, targets[:, None])[:, 0] - normaliser
    is_greedy = logits.argmax(-1) == targets
    rows = zip(token_ids, logprobs.tolist(), is_greedy.tolist(), strict=True)
    return [TokenScore(*row) for row in rows]
