"""Where checkpoints keep KV-cache scales: our own names and everybody else's.

After the attention module's prefix (``model.layers.0.self_attn``, ``backbone.layers.0.mixer``, ...):

| name | written by |
|---|---|
| ``k_scale``, ``v_scale`` | compressed-tensors, fp8kv |
| ``attn.k_scale``, ``attn.v_scale`` | vLLM's and SGLang's own module path |
| ``attn_mqa.k_scale``, ``attn_mqa.v_scale`` | SGLang's path for MLA |
| ``mla_attn.k_scale``, ``mla_attn.mla_attn.k_scale`` | vLLM's path for MLA |
| ``k_proj.k_scale``, ``v_proj.v_scale`` | ModelOpt |
| ``qkv_proj.k_scale``, ``qkv_proj.v_scale`` | ModelOpt, fused projections |
| ``k_proj.output_scale``, ``v_proj.output_scale`` | Quark |
| ``k_cache.scale``, ``v_cache.scale`` | HunYuan |
| ``kv_scale`` | deprecated: one scale for both |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import Checkpoint

Stream = Literal["k", "v", "kv"]

_IN_ATTENTION = re.compile(
    r"(?P<layer>(?:.*?\.)?(?:self_attn|attention|attn|mixer)(?:\.\d+)?)\.(?P<rest>.+)"
)
_KV_SCALE = re.compile(
    r"(?:[a-z0-9_]+\.)*?(?P<direct>k|v|kv)_scale"
    r"|(?P<quark>k|v)_proj\.output_scale"
    r"|(?P<cache>k|v)_cache\.scale"
)
# Scales of the attention's other inputs, and zero points: no KV scales, but no weights either.
_OTHER_SCALE = re.compile(
    r"(?:[a-z0-9_]+\.)*?(?:q|prob)_scale"
    r"|q_proj\.output_scale|prob_output_scale|q\.scale"
    r"|(?:[a-z0-9_]+\.)*?[qkv]_zero_point"
)


@dataclass(frozen=True)
class FoundScale:
    """A KV scale tensor that a checkpoint holds.

    Attributes:
        layer: prefix of the attention module, e.g. ``model.layers.0.self_attn``.
        stream: what it scales; ``kv`` for one scale of both.
        tensor: the tensor's full name.
        style: the spelling, with ``{}`` where the stream stands: ``{}_scale``, ``{}_proj.{}_scale``,
            ``{}_proj.output_scale``, ``attn.{}_scale``, ``kv_scale``, ...
        value: float32, flat: one element, or one per KV head.
    """

    layer: str
    stream: Stream
    tensor: str
    style: str
    value: Tensor


def find_kv_scales(checkpoint: Checkpoint) -> list[FoundScale]:
    """Return every KV scale that ``checkpoint`` holds, in whatever spelling, in the order of its index.

    A layer may be found several times, where a checkpoint holds aliases.

    Raises:
        CheckpointError: a scale tensor cannot be read.
    """
    names = [name for name in checkpoint.weight_map if is_kv_scale_name(name)]
    values = dict(checkpoint.read_many(names))
    found = []
    for name in names:
        layer, stream, style = _parse(name)
        value = values[name].to(torch.float32).flatten()
        found.append(FoundScale(layer, stream, name, style, value))
    return found


def is_kv_scale_name(name: str) -> bool:
    """Tell whether ``name`` is that of a K or V scale in a spelling of this module's table."""
    if not name.endswith("scale"):
        return False  # a checkpoint has 100,000 other names
    match = _IN_ATTENTION.fullmatch(name)
    return match is not None and _KV_SCALE.fullmatch(match["rest"]) is not None


def is_attention_scale_name(name: str) -> bool:
    """Tell whether ``name`` scales anything in attention: K, V, the query, the probabilities; or is a zero point."""
    if not name.endswith(("scale", "zero_point")):
        return False
    match = _IN_ATTENTION.fullmatch(name)
    return match is not None and (
        _KV_SCALE.fullmatch(match["rest"]) is not None
        or _OTHER_SCALE.fullmatch(match["rest"]) is not None
    )


def _parse(name: str) -> tuple[str, Stream, str]:
    """Return layer, stream and style of a KV scale's name."""
    in_attention = _IN_ATTENTION.fullmatch(name)
    scale = _KV_SCALE.fullmatch(in_attention["rest"]) if in_attention else None
    if in_attention is None or scale is None:
        raise ValueError(f"{name!r} is not the name of a KV scale")
    stream = cast(Stream, scale["direct"] or scale["quark"] or scale["cache"])
    style = in_attention["rest"]
    if stream != "kv":
        style = re.sub(rf"\b{stream}_", "{}_", style)
    return in_attention["layer"], stream, style
