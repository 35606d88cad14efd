"""Batched greedy generation with stop strings, on an unmodified transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from fp8kv.calibrate.modeling.load import pad_token_id
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.architectures import text_config


def generate_greedy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Return the greedy continuation of each prompt; a stop string, where one came, is still in it.

    Prompts are padded to the left and run as one batch.

    Raises:
        EvaluationError: a prompt and its answer do not fit into the model's positions.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    limit = max_positions(model)
    if limit is not None and longest + max_new_tokens > limit:
        raise EvaluationError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {limit} positions: "
            "use fewer shots (--num-fewshot)"
        )
    pad = pad_token_id(tokenizer)
    device = next(model.parameters()).device
    token_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted(eos_token_ids(model, tokenizer)) or None,
    )
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            token_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_StopStrings(tokenizer, stops, longest)]),
        )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:].cpu(), skip_special_tokens=True)
    return texts


def eos_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return what ends a text: by the tokenizer, and by the model's generation settings, which may name several."""
    generation: Any = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens a sequence may have, None where the model sets no limit."""
    return getattr(text_config(model), "max_position_embeddings", None)


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Stop a row once its new text holds a stop string; looks only at the tail, where a new one can have come."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._start = start
        # a token is at least one byte, so a stop string spans at most its bytes in tokens
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(new.cpu(), skip_special_tokens=False)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
