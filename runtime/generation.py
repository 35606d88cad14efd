"""What a model says of its texts: what ends one, and how long one may be."""

from __future__ import annotations

from typing import Any

from torch import nn

from fp8kv.runtime.architectures import text_config


def eos_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return what ends a text: by the tokenizer, and by the model's generation settings, which may name several."""
    generation: Any = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens a sequence may have, None where the model sets no limit."""
    return getattr(text_config(model), "max_position_embeddings", None)
