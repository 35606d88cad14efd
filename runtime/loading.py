"""A checkpoint in memory: what several LLMs, one after the other, can share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8kv.calibrate.formats.checkpoint import Checkpoint, open_checkpoint
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer
from fp8kv.calibrate.modeling.placement import resolve_device, resolve_dtype
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.cache_scales import CacheScales, read_scales
from fp8kv.runtime.checks import check_choice

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    For other scales on the same weights: ``dataclasses.replace(loaded, scales=...)``.

    Attributes:
        model: of transformers, in evaluation mode, on its device.
        tokenizer: of transformers.
        scales: of the KV cache; None where there are none.
        checkpoint: what the model was loaded from; None where it was made in memory.
    """

    model: nn.Module
    tokenizer: Any
    scales: CacheScales | ScaleSet | None = None
    checkpoint: Checkpoint | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and arithmetic."""
        return next(self.model.parameters()).dtype

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.num_embeddings)


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Read a checkpoint of Hugging Face's format, with the KV scales that it carries.

    Args:
        path: a directory or a hub id.
        dtype: of weights and arithmetic: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto`` or a torch device.
        revision: of a hub id.
        trust_remote_code: let the checkpoint run Python code of its own.
        progress: told how many bytes of the weights were read, and of how many.

    Raises:
        Fp8kvError: a subclass that says what is wrong with the checkpoint, the model or the settings.
    """
    check_choice("dtype", dtype, DTYPES)
    place = resolve_device(device)
    checkpoint = open_checkpoint(path, revision)
    # what can be refused is refused before the weights are read
    scales = read_scales(checkpoint)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model = load_model(
        checkpoint,
        dtype=resolve_dtype(dtype, checkpoint, place),
        device=place,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return LoadedModel(model, tokenizer, scales, checkpoint)


def load_once(
    source: str | Path | LoadedModel,
    *,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
) -> LoadedModel:
    """Return ``source`` if it is loaded already, else :func:`load` it.

    Raises:
        Fp8kvError: as of :func:`load`; or settings of loading are given for a model that is loaded.
    """
    if not isinstance(source, LoadedModel):
        return load(
            source,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if (dtype, device, revision, trust_remote_code) != ("auto", "auto", None, False):
        raise RequestError(
            "the model is loaded already: give dtype, device, revision and trust_remote_code to load()"
        )
    return source
