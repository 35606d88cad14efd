"""Attention backends: ``reference`` in plain torch on any device, ``triton`` with fp8kv's kernels on a GPU."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.backends.base import (
    AttendsLatents,
    AttentionOptions,
    Backend,
    PreparedQkv,
    PreparesPrefill,
    Rope,
)
from fp8kv.runtime.backends.reference import ReferenceBackend

__all__ = [
    "BACKENDS",
    "AttendsLatents",
    "AttentionOptions",
    "Backend",
    "PreparedQkv",
    "PreparesPrefill",
    "Rope",
    "choose_backend",
]

BACKENDS = ("reference", "triton")
"""The names that :func:`choose_backend` knows."""


def choose_backend(name: str | None, device: torch.device | str) -> Backend:
    """Return the backend called ``name``, by default the fastest that runs on ``device``.

    Raises:
        EvaluationError: the name is unknown, or the backend does not run on this device.
    """
    if name is not None and name not in BACKENDS:
        raise EvaluationError(f"unknown backend {name!r}; known backends: {', '.join(BACKENDS)}")
    has_triton = importlib.util.find_spec("triton") is not None
    on_gpu = torch.device(device).type == "cuda"
    if name == "triton" and not (has_triton and on_gpu):
        lack = f"it would run on {device}" if has_triton else "Triton is not installed"
        raise EvaluationError(
            f"backend 'triton' needs Triton and a CUDA device, but {lack}; use backend 'reference'"
        )
    if name == "reference" or not (has_triton and on_gpu):
        return ReferenceBackend()
    # not at the top: without Triton, which only some platforms have, the other backend must still be there
    module = importlib.import_module("fp8kv.runtime.backends.triton")
    backend: Backend = module.TritonBackend()
    return backend
