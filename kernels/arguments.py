"""What every launcher checks before it launches. Needs torch alone.

Launchers refuse and never repair: a wrong shape, dtype, device or stride is an error that names the argument, what
was found and what is required. No check reads a value from the device, so all of it may run while a CUDA graph is
being captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDE_TYPES = (torch.bfloat16, torch.float16)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)
INDEX_TYPES = (torch.int32, torch.int64)


class KernelArgumentError(ValueError):
    """An argument of a kernel launcher is not what its contract asks for."""

    def __init__(self, argument: str, found: object, required: object) -> None:
        super().__init__(f"{argument} is {found}, but must be {required}")
        self.argument = argument


def require(condition: bool, argument: str, found: object, required: object) -> None:
    """Raise unless ``condition`` holds.

    Raises:
        KernelArgumentError: naming the argument, what was found and what is required.
    """
    if not condition:
        raise KernelArgumentError(argument, found, required)


def require_dtype(argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise unless the dtype of ``tensor`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = " or ".join(_name(dtype) for dtype in allowed)
        raise KernelArgumentError(f"the dtype of {argument}", _name(tensor.dtype), names)


def require_cache_dtype(argument: str, cache: Tensor, numbers: Tensor) -> None:
    """Raise unless ``cache`` holds FP8 codes, or 16-bit numbers of the dtype of ``numbers``: an unquantised cache."""
    unquantised = tuple(dtype for dtype in WIDE_TYPES if dtype == numbers.dtype)
    require_dtype(argument, cache, (*unquantised, *FP8_TYPES))


def require_shape(argument: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise unless ``tensor`` has this shape; ``None`` stands for any length."""
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(
        wanted is None or wanted == length for length, wanted in zip(found, shape, strict=True)
    )
    if not fits:
        required = ", ".join("any" if length is None else str(length) for length in shape)
        raise KernelArgumentError(f"the shape of {argument}", list(found), f"[{required}]")


def require_unit_stride(argument: str, tensor: Tensor) -> None:
    """Raise unless neighbours in the last dimension are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelArgumentError(f"the last stride of {argument}", tensor.stride(-1), 1)


def require_same_device(**tensors: Tensor | None) -> torch.device:
    """Raise unless all given tensors lie on one device, and return it."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != reference.device:
            raise KernelArgumentError(
                f"the device of {name}", tensor.device, f"{reference.device}, where {first} is"
            )
    return reference.device


def require_scale(argument: str, scale: Tensor, heads: int | None) -> None:
    """Raise unless ``scale`` is a float32 tensor of one element, or of ``heads`` elements.

    Args:
        argument: its name in the launcher.
        scale: the scale as it was given.
        heads: how many heads may have a scale of their own; ``None`` allows one scale only.
    """
    if not isinstance(scale, Tensor):
        raise KernelArgumentError(
            argument, f"a {type(scale).__name__}", "a float32 tensor on the device of the data"
        )
    require_dtype(argument, scale, (torch.float32,))
    allowed = (1,) if heads is None else (1, heads)
    if scale.numel() not in allowed or scale.dim() > 1:
        elements = " or ".join(str(count) for count in dict.fromkeys(allowed))
        raise KernelArgumentError(
            f"the shape of {argument}",
            list(scale.shape),
            f"of {elements} elements in one dimension",
        )
    if scale.numel() > 1 and scale.stride(0) != 1:
        raise KernelArgumentError(f"the stride of {argument}", scale.stride(0), 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
