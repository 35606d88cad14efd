"""Logits on reference answers from an unmodified model: one forward pass over a padded batch of prompts and answers.

Studies compare them, and what the engine says is tested against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8kv.calibrate.modeling.load import pad_token_id


@dataclass(frozen=True)
class ForcedBatch:
    """Prompts with their reference answers, padded to the left so that all answers end together.

    Attributes:
        token_ids: ``[batch, tokens]`` int64.
        mask: ``[batch, tokens]`` int64, 0 on padding.
        is_answer: ``[batch, longest answer]`` bool: which of the last positions belong to the answer.
    """

    token_ids: Tensor
    mask: Tensor
    is_answer: Tensor

    @property
    def reference_tokens(self) -> Tensor:
        """The answers' token ids, ``[answer tokens]``, row after row."""
        return self.token_ids[:, -self.is_answer.shape[1] :][self.is_answer]


def encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that follow a prompt: without what the tokenizer puts around a whole text."""
    encoded: list[list[int]] = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    return encoded


def force(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> ForcedBatch:
    """Tokenise each prompt with its answer.

    The answer's tokens are those after the prompt's own; both are tokenised apart, as a server sees them.
    """
    heads = tokenizer(list(prompts))["input_ids"]
    tails = encode_answers(tokenizer, answers)
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    longest_tail = max(len(tail) for tail in tails)
    pad = pad_token_id(tokenizer)
    rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
    return ForcedBatch(
        token_ids=torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        is_answer=torch.tensor(
            [[False] * (longest_tail - len(tail)) + [True] * len(tail) for tail in tails]
        ),
    )


def answer_logits(model: nn.Module, batch: ForcedBatch) -> Tensor:
    """Return the logits that predict each answer token, ``[answer tokens, vocabulary]``, on the model's device."""
    device = next(model.parameters()).device
    kept = batch.is_answer.shape[1] + 1
    with torch.inference_mode():
        output = model(
            input_ids=batch.token_ids.to(device),
            attention_mask=batch.mask.to(device),
            position_ids=(batch.mask.cumsum(1) - 1).clamp_min(0).to(device),
            use_cache=False,
            logits_to_keep=kept,
        )
    logits: Tensor = output.logits[:, -kept:-1]
    return logits[batch.is_answer.to(device)]
