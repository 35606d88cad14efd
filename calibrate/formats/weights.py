"""Decode the weights of a checkpoint to plain floating-point tensors, whatever they are stored in.

:mod:`fp8kv.calibrate.modeling.weight_stream` reads what this module names and decodes it.

| stored as | tensors of a module | decoded |
|---|---|---|
| plain | ``weight`` | cast |
| FP8, block scales (DeepSeek, MiniMax, Qwen) | ``weight`` F8, ``weight_scale_inv`` | ragged last blocks included |
| FP8, one scale per tensor or row (compressed-tensors, ModelOpt) | ``weight`` F8, ``weight_scale`` | |
| INT4 (compressed-tensors ``pack-quantized``) | ``weight_packed`` I32, ``weight_scale``, ``weight_shape`` | symmetric only |

All else that is quantised (AWQ, GPTQ, MXFP4, NVFP4, bitsandbytes, ...) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.facts import quantization_config
from fp8kv.calibrate.formats.kv_names import is_attention_scale_name
from fp8kv.calibrate.formats.weight_codecs import (
    WeightScheme,
    decode_fp8,
    decode_int4,
    read_scheme,
)
from fp8kv.recipes.errors import CheckpointError, UnsupportedModelError

_FP8_WEIGHTS = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("BF16", "F16", "F32", "F64")
_INTEGERS = ("BOOL", "I16", "I32", "I64", "U16", "U32", "U64")  # plain buffers, kept as they are

# Scales of activations, which only the FP8 arithmetic of an engine needs.
_ACTIVATION_SUFFIXES = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "output_scale",
)
_USE_ANOTHER = "start from the BF16, FP8 or compressed-tensors INT4 release of this model"
_REFUSED_SUFFIXES: Mapping[str, str] = {
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    "_blocks": "MXFP4",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".weight_zero_point": "asymmetric compressed-tensors",
    ".weight_g_idx": "compressed-tensors with activation reordering",
}


@dataclass(frozen=True)
class StoredWeight:
    """How one plain tensor is stored.

    Attributes:
        kind: ``plain``, ``fp8`` or ``int4``.
        parts: the stored tensors: the codes first, then the scale, then for INT4 the shape.
    """

    kind: Literal["plain", "fp8", "int4"]
    parts: tuple[str, ...]


def stored_weights(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Map the name of each plain tensor, e.g. ``...q_proj.weight``, to the stored tensors it is decoded from.

    Scales of weights are parts of their weight; scales of activations and of the KV cache are left out.

    Raises:
        UnsupportedModelError: a tensor is quantised in a way that fp8kv cannot decode.
        CheckpointError: a quantised weight lacks its scale or shape.
    """
    names = checkpoint.weight_map
    weights: dict[str, StoredWeight] = {}
    for name in names:
        _refuse_unknown(checkpoint, name)
        if name.endswith(".weight_packed"):
            weights[name.removesuffix("_packed")] = _int4_weight(checkpoint, name)
        elif checkpoint.entry(name).dtype in _FP8_WEIGHTS:
            weights[name] = _fp8_weight(checkpoint, name)
    consumed = {part for weight in weights.values() for part in weight.parts}
    modules = {name.rpartition(".")[0] for name in weights}
    for name in names:
        module, _, suffix = name.rpartition(".")
        is_activation = module in modules and suffix in _ACTIVATION_SUFFIXES
        if name in consumed or is_activation or is_attention_scale_name(name):
            continue
        if checkpoint.entry(name).dtype not in (*_FLOATS, *_INTEGERS):
            raise UnsupportedModelError(
                f"{name} of {checkpoint.path} is stored as {checkpoint.entry(name).dtype}, which fp8kv cannot "
                f"decode; {_USE_ANOTHER}"
            )
        weights[name] = StoredWeight("plain", (name,))
    return weights


def weight_scheme(checkpoint: Checkpoint) -> WeightScheme:
    """Read what the checkpoint's quantisation config says about its weights."""
    return read_scheme(quantization_config(checkpoint)[1])


def decode(
    checkpoint: Checkpoint,
    weight: StoredWeight,
    tensors: Sequence[Tensor],
    scheme: WeightScheme,
    dtype: torch.dtype,
) -> Tensor:
    """Return the plain tensor of a quantised weight in ``dtype``, on the device of its codes.

    Args:
        checkpoint: that holds the weight.
        weight: ``fp8`` or ``int4``.
        tensors: its parts, in their order; an INT4 weight's shape is best left on the CPU.
        scheme: of the checkpoint.
        dtype: of the result.

    Raises:
        CheckpointError: the parts do not fit together.
    """
    try:
        if weight.kind == "fp8":
            return decode_fp8(tensors[0], tensors[1], scheme, dtype)
        return decode_int4(tensors[0], tensors[1], tensors[2], scheme, dtype)
    except ValueError as error:
        raise CheckpointError(
            f"cannot decode {weight.parts[0]} of {checkpoint.path}: {error}; check its quantization_config"
        ) from None


def _refuse_unknown(checkpoint: Checkpoint, name: str) -> None:
    for suffix, scheme in _REFUSED_SUFFIXES.items():
        if name.endswith(suffix):
            raise UnsupportedModelError(
                f"{name} of {checkpoint.path} belongs to {scheme} weights, which fp8kv cannot decode; "
                f"{_USE_ANOTHER}"
            )


def _int4_weight(checkpoint: Checkpoint, packed: str) -> StoredWeight:
    base = packed.removesuffix("_packed")
    if checkpoint.entry(packed).dtype != "I32":
        raise UnsupportedModelError(
            f"{packed} of {checkpoint.path} is packed in {checkpoint.entry(packed).dtype} (NVFP4 or another "
            f"format), which fp8kv cannot decode; {_USE_ANOTHER}"
        )
    parts = (packed, f"{base}_scale", f"{base}_shape")
    _require_parts(checkpoint, packed, parts[1:])
    return StoredWeight("int4", parts)


def _fp8_weight(checkpoint: Checkpoint, name: str) -> StoredWeight:
    for scale in (f"{name}_scale_inv", f"{name}_scale"):
        if scale in checkpoint.weight_map:
            return StoredWeight("fp8", (name, scale))
    raise CheckpointError(
        f"{name} of {checkpoint.path} is FP8 but has neither {name}_scale_inv nor {name}_scale; "
        "download the missing shards or use another release"
    )


def _require_parts(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        if part not in checkpoint.weight_map:
            raise CheckpointError(
                f"{name} of {checkpoint.path} is quantised but has no {part}; download the missing shards"
            )
