"""Choose the next token of each sequence: greedy, or drawn after temperature, top-k and top-p.

A draw depends on the sequence's own logits, parameters, seed and step, and on nothing else in the batch. So the
random number of a step is a hash of the two, and probabilities are whole numbers: their sums are exact in any order,
where those of floating-point numbers would change with the shape of the batch, and with them now and then a token.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.checks import check_integer, check_switch

MAX_LOGPROBS = 20
"""Most alternatives that a request gets with each token."""

NOT_FINITE = "the logits hold NaN or infinity: try another dtype (bfloat16 or float32), or a cache whose scales were calibrated"
"""What is said where there is no next token."""

_NO_TOKEN = -1
"""Stands among the chosen tokens for one that there is not."""

_ONE = float(1 << 40)
"""The weight of the likeliest token. Sums over vocabularies of up to 2^22 tokens fit into int64."""


@dataclass(frozen=True)
class SamplingParameters:
    """How a prompt is continued, how long, and how many times.

    Attributes:
        max_tokens: new tokens, at most.
        temperature: divides the logits; 0 takes the likeliest token, of equals the one with the lowest id.
        top_k: draw among this many likeliest tokens only; None for all.
        top_p: then draw among the fewest likeliest tokens only whose probabilities sum to this.
        seed: makes the draws repeatable; None draws differently every time.
        stop: strings that end the text, which does not include them.
        logprobs: report the log-probability of each token and of this many likeliest ones; None reports nothing.
        n: continuations, each drawn on its own.
        ignore_eos: go on after the end of sequence.

    Raises:
        RequestError: a value is out of its range or of the wrong type.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, least=1)
        check_integer("n", self.n, least=1)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, least=1)
        if self.seed is not None:
            check_integer("seed", self.seed)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, least=0, most=MAX_LOGPROBS)
        if not _is_number(self.temperature) or not 0 <= self.temperature <= sys.float_info.max:
            raise RequestError(f"temperature is {self.temperature!r}: give 0 or a positive number")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p!r}: give a number above 0, at most 1")
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise RequestError(f"stop is {self.stop!r}: give a tuple of strings that are not empty")
        check_switch("ignore_eos", self.ignore_eos)


@dataclass(frozen=True)
class Sampled:
    """The next token of each sequence.

    Attributes:
        token_ids: one for each sequence; None where its logits hold NaN or infinity, so that there is none.
        logprobs: their natural log-probabilities by the model, before temperature, top-k and top-p; None where they
            were not asked for.
        top: for each sequence the likeliest tokens with theirs, best first; empty where none were asked for.
    """

    token_ids: list[int | None]
    logprobs: list[float | None]
    top: list[tuple[tuple[int, float], ...]]


class PendingSample:
    """Tokens that the device is choosing, perhaps behind a forward pass that still runs.

    Attributes:
        chosen: ``[sequences]`` int64 on the device, for a pass that is launched before anybody reads them; where there
            is no token, any that the model knows.
    """

    def __init__(
        self,
        chosen: Tensor,
        is_token: Tensor,
        asked: Sequence[int],
        report: Sequence[Tensor],
        counts: Sequence[int],
    ) -> None:
        self.chosen = chosen
        self._asked = asked
        self._counts = counts
        # torch pins what it does not wait for
        self._token_ids, *self._report = (
            tensor.to("cpu", non_blocking=True)
            for tensor in (chosen.where(is_token, _NO_TOKEN), *report)
        )
        self._done: torch.cuda.Event | None = None
        if chosen.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(chosen.device))

    def read(self) -> Sampled:
        """Wait for the device and return what it chose."""
        if self._done is not None:
            self._done.synchronize()
        token_ids = [None if token_id < 0 else token_id for token_id in self._token_ids.tolist()]
        logprobs: list[float | None] = [None] * len(token_ids)
        top: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
        if self._asked:
            values, best_values, best_ids = (tensor.tolist() for tensor in self._report)
            for place, row in enumerate(self._asked):
                logprobs[row] = values[place]
                pairs = zip(best_ids[place], best_values[place], strict=True)
                top[row] = tuple(islice(pairs, self._counts[place]))
        return Sampled(token_ids, logprobs, top)


def sample(
    logits: Tensor, parameters: Sequence[SamplingParameters], steps: Sequence[int]
) -> PendingSample:
    """Choose the next token of each sequence; nothing here waits for the device.

    Args:
        logits: ``[sequences, vocab]``, float32.
        parameters: of each sequence.
        steps: how many tokens of each sequence were drawn before this one; with the seed it gives the draw.
    """
    # NaN and infinity are found as the largest
    largest, chosen = logits.max(-1)
    drawn = [row for row, own in enumerate(parameters) if own.temperature > 0]
    if drawn:
        rows = upload(drawn, torch.int64, logits.device)
        uniform = [_uniform(parameters[row].seed, steps[row]) for row in drawn]
        weights = draw_weights(logits[rows], [parameters[row] for row in drawn])
        chosen[rows] = _draw(weights, uniform)
    asked, counts = [], []
    for row, own in enumerate(parameters):
        if own.logprobs is not None:
            asked.append(row)
            counts.append(own.logprobs)
    report: tuple[Tensor, ...] = ()
    if asked:
        rows = upload(asked, torch.int64, logits.device)
        report = token_logprobs(logits[rows], chosen[rows], max(counts))
    return PendingSample(chosen, largest.isfinite(), asked, report, counts)


def token_logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of ``chosen [rows]``, and those and the ids of the ``count`` likeliest tokens.

    Of equally likely tokens the one with the lowest id comes first. Nothing here waits for the device.
    """
    normaliser = logits.logsumexp(-1, keepdim=True)
    logprobs = (logits.gather(-1, chosen[:, None]) - normaliser)[:, 0]
    if not count:
        return logprobs, logits[:, :0], chosen[:, None][:, :0]
    # a stable sort puts the lowest id first among equals, as argmax does
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return logprobs, values[:, :count] - normaliser, ids[:, :count]


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values`` on ``device``, without a wait for what runs there."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # a copy from memory that is not pinned would wait for the forward pass
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def draw_weights(logits: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """Return what each token is drawn in proportion to, as whole numbers.

    The likeliest token weighs 2^40 and others exp((logit - largest) / temperature) of that, rounded down; those that
    top-k or top-p exclude weigh 0. Peak memory: 24 bytes a logit, 70 where top-k or top-p is given.

    Args:
        logits: ``[rows, vocab]``.
        parameters: of each row; the temperatures are positive.

    Returns:
        ``[rows, vocab]``, int64.
    """
    scores = logits.double()
    scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / _column([own.temperature for own in parameters], logits.device)
    # NaN is found by the largest logit; here it must only not become an index
    weights = (scores.exp().nan_to_num(nan=0.0) * _ONE).long()
    truncated = [
        row for row, own in enumerate(parameters) if own.top_k is not None or own.top_p < 1
    ]
    if truncated:
        rows = upload(truncated, torch.int64, logits.device)
        own = [parameters[row] for row in truncated]
        weights[rows] = _truncate(logits[rows], weights[rows], own)
    return weights


def _truncate(logits: Tensor, weights: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    vocab = logits.shape[-1]
    top_k = _column(
        [vocab if own.top_k is None else min(own.top_k, vocab) for own in parameters], logits.device
    )
    top_p = _column([own.top_p for own in parameters], logits.device)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ordered = weights.gather(-1, order)
    ordered = ordered.where(torch.arange(vocab, device=logits.device) < top_k, 0)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.where(before < top_p * ordered.sum(-1, keepdim=True), 0)
    return torch.zeros_like(weights).scatter(-1, order, ordered)


def _draw(weights: Tensor, uniform: Sequence[float]) -> Tensor:
    """Return ``[rows]``: the first token at which the running sum of ``weights [rows, vocab]`` passes the draw."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    # float64 holds 53 bits of up to 62, so the product can round up to the total itself
    target = (_column(uniform, weights.device) * total).long().minimum(total - 1)
    return torch.searchsorted(sums, target, right=True)[:, 0]


def _uniform(seed: int | None, step: int) -> float:
    """Return a number in [0, 1) of 53 random bits, the same for the same seed and step."""
    if seed is None:
        bits = secrets.randbits(53)
    else:
        digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
        bits = int.from_bytes(digest[:8], "big") >> 11
    return bits / (1 << 53)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return upload(values, torch.float64, device)[:, None]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
