"""Where a model runs, and in which dtype."""

from __future__ import annotations

import torch

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.facts import text_config
from fp8kv.recipes.errors import CalibrationError

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def resolve_device(device: str) -> torch.device:
    """Return the torch device; ``auto`` is a GPU where there is one.

    Raises:
        CalibrationError: torch does not know the device, or has none of it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"device {device!r} cannot be used here: {reason}") from None
    return chosen


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward passes.

    ``auto`` is the checkpoint's own on a GPU. On a CPU it is float32, in which CPUs are faster and which rounds
    what is measured less.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    config = text_config(checkpoint.config)
    declared = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(declared).removeprefix("torch."), torch.bfloat16)
