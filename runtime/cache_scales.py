"""The KV scales that a checkpoint carries, whoever wrote them, as the runtime applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.calibrate.formats.attention_modules import is_layer_tensor
from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.json_text import read_object
from fp8kv.calibrate.formats.kv_names import FoundScale, find_kv_scales
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.kernels.fp8 import FORMATS
from fp8kv.recipes.errors import CheckpointError, ScaleError

# the record that `fp8kv calibrate` leaves; it alone says which FP8 format the scales are for
_MANIFEST = "fp8kv/manifest.json"


@dataclass(frozen=True)
class CacheScales:
    """K and V scales by layer.

    Unlike a :class:`~fp8kv.calibrate.scales.ScaleSet` it holds what it finds: other writers' scales need not be
    bfloat16 numbers, and a layer may have one stream's only.

    Attributes:
        fp8_format: a key of :data:`fp8kv.kernels.fp8.FORMATS`.
        layers: the K and the V scale by the checkpoint-side name of the attention module, float32 [1] or [kv_heads],
            on the CPU; None for one that is not there.
    """

    fp8_format: str
    layers: Mapping[str, tuple[Tensor | None, Tensor | None]]

    @classmethod
    def from_scale_set(cls, scales: ScaleSet) -> CacheScales:
        """Return the same scales as the runtime takes them."""
        layers = {
            layer.name: (torch.tensor(layer.k), torch.tensor(layer.v)) for layer in scales.layers
        }
        return cls(scales.fp8_format, layers)

    def find(self, module: str) -> tuple[Tensor | None, Tensor | None] | None:
        """Return the K and the V scale of an attention module, or None if the checkpoint has neither.

        Wrappers name the same layer differently in checkpoints and in transformers (``language_model.model.layers.0``
        and ``model.language_model.layers.0``), so what follows ``layers.`` decides.

        Args:
            module: the module's name in the transformers model.
        """
        wanted = _suffix(module)
        return next((pair for name, pair in self.layers.items() if _suffix(name) == wanted), None)


def read_scales(checkpoint: Checkpoint) -> CacheScales | None:
    """Return the KV scales of a checkpoint's decoder, in any spelling that is known, or None if it has none.

    Raises:
        CheckpointError: a scale or fp8kv's own record cannot be read.
        ScaleError: a scale is not finite and positive, or two names of one scale differ.
    """
    streams: dict[str, dict[str, FoundScale]] = {}
    for scale in find_kv_scales(checkpoint):
        if not is_layer_tensor(scale.tensor):
            continue  # of an encoder or a draft head, whose layers are counted from 0, too
        _check(scale)
        for stream in scale.stream:
            known = streams.setdefault(scale.layer, {}).setdefault(stream, scale)
            if not torch.equal(known.value, scale.value):
                raise ScaleError(
                    f"{known.tensor} and {scale.tensor} are two names of one scale, but differ; "
                    "remove the wrong one from the checkpoint"
                )
    if not streams:
        return None

    def value(found: Mapping[str, FoundScale], stream: str) -> Tensor | None:
        return found[stream].value if stream in found else None

    layers = {layer: (value(found, "k"), value(found, "v")) for layer, found in streams.items()}
    return CacheScales(_fp8_format(checkpoint), layers)


def _check(scale: FoundScale) -> None:
    if not bool((torch.isfinite(scale.value) & (scale.value > 0)).all()):
        raise ScaleError(
            f"{scale.tensor} is {scale.value.tolist()}, but a scale is positive and finite; "
            "calibrate the checkpoint anew"
        )


def _fp8_format(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / _MANIFEST
    if not path.is_file():
        return "e4m3fn"  # what every other writer calibrates for
    name = read_object(path)[0].get("fp8_format")
    if name not in FORMATS:
        raise CheckpointError(
            f"fp8_format in {path} is {name!r}, and this fp8kv knows {', '.join(FORMATS)}; "
            "use the fp8kv that wrote it"
        )
    return str(name)


def _suffix(name: str) -> str:
    return name.rsplit("layers.", 1)[-1]
