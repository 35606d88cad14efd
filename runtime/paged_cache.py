"""The paged KV cache of a model: one tensor, or a pair, for each layer, with the scales that it is held at.

| mode | what a page holds |
|---|---|
| ``bf16`` | K and V in bfloat16, unquantised |
| ``fp8`` | FP8 codes at the checkpoint's scales |
| ``fp8-unit`` | FP8 codes at scale 1.0 |
| ``emulate`` | bfloat16 values that went through FP8 at the checkpoint's scales and back |
| ``float32`` | K and V unquantised in float32; what tests compare with |

``emulate`` beside ``fp8`` tells the error of quantisation from that of the kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fp8kv.calibrate.modeling.tap import AttentionModule, CacheWrite, tap
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.kernels.fp8 import Fp8Format, get_format
from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size
from fp8kv.recipes.errors import EvaluationError, ScaleError, UnsupportedModelError
from fp8kv.runtime.cache_scales import CacheScales

__all__ = [
    "CacheMode",
    "LayerCache",
    "LayerDims",
    "PagedCache",
    "build_cache",
    "bytes_per_token",
    "measure_dims",
]

CacheMode = Literal["bf16", "fp8", "fp8-unit", "emulate", "float32"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerDims:
    """What one attention module caches for a token.

    Attributes:
        attention: ``gqa`` or ``mla``.
        kv_heads: heads of K and V; 1 for MLA.
        k_dim: width of a K head; for MLA of the row, latent and rope part.
        v_dim: width of a V head; for MLA of the latent, which is the row's first columns.
    """

    attention: Literal["gqa", "mla"]
    kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def elements(self) -> int:
        """Numbers that a token takes; V of MLA is a part of the row and takes none."""
        v_dim = 0 if self.attention == "mla" else self.v_dim
        return self.kv_heads * (self.k_dim + v_dim)


@dataclass(frozen=True)
class LayerCache:
    """The pages of one attention module.

    Attributes:
        name: the module's name in the transformers model.
        attention: ``gqa``, or ``mla`` where a row is [latent | rope part] and V its first columns.
        k: [pages, page_size, kv_heads, k_dim]; for MLA [pages, page_size, latent_dim + rope_dim].
        v: [pages, page_size, kv_heads, v_dim]; None for MLA.
        k_scale: float32 on the device, [1] or [kv_heads]; 1.0 where nothing is quantised.
        v_scale: the same for V; for MLA the very same tensor as ``k_scale``.
        mode: how values are held.
        v_dim: width of a V head; for MLA latent_dim.
        fmt: the FP8 format that values go through; None where they go through none.
    """

    name: str
    attention: Literal["gqa", "mla"]
    k: Tensor
    v: Tensor | None
    k_scale: Tensor
    v_scale: Tensor
    mode: CacheMode
    v_dim: int
    fmt: Fp8Format | None

    @property
    def holds_codes(self) -> bool:
        """Whether the pages hold FP8 codes, whose value is ``float(code) * scale``."""
        return self.fmt is not None and self.k.dtype == self.fmt.dtype


@dataclass(frozen=True)
class PagedCache:
    """The pages of all layers. Page p of every layer belongs to the same tokens.

    Attributes:
        layers: by the module's name in the transformers model, in model order.
        page_size: tokens of a page.
        num_pages: pages of a layer.
        bytes_per_token: of all layers together.
    """

    layers: Mapping[str, LayerCache]
    page_size: int
    num_pages: int
    bytes_per_token: int


def measure_dims(model: nn.Module, modules: Mapping[str, AttentionModule]) -> dict[str, LayerDims]:
    """Return what each attention module caches, by running one token through the model.

    Configurations spell these sizes in many ways and leave some to defaults; what a module hands to its cache is
    the truth.

    Args:
        model: a transformers model in evaluation mode.
        modules: what ``find_attention_modules`` returns for it.

    Raises:
        UnsupportedModelError: a module writes no cache.
    """
    found: dict[str, LayerDims] = {}

    def note(write: CacheWrite) -> None:
        k_dim, v_dim = write.keys.shape[-1], write.values.shape[-1]
        if write.attention.attention == "mla":
            k_dim, v_dim = k_dim + v_dim, k_dim
        kind = write.attention.attention
        found[write.attention.name] = LayerDims(kind, write.keys.shape[1], k_dim, v_dim)

    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with tap(modules, note), torch.no_grad():
        model(input_ids=token, use_cache=False)
    missing = [name for name in modules if name not in found]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} cached nothing at {', '.join(missing[:3])}: "
            "this transformers version passes its cache in a way that fp8kv does not know"
        )
    return {name: found[name] for name in modules}


def bytes_per_token(dims: Mapping[str, LayerDims], mode: CacheMode) -> int:
    """Return the bytes that one token takes in all layers; what a memory budget is divided by."""
    itemsize = _UNQUANTISED.get(mode, torch.float8_e4m3fn).itemsize
    return itemsize * sum(layer.elements for layer in dims.values())


def build_cache(
    modules: Mapping[str, AttentionModule],
    dims: Mapping[str, LayerDims],
    *,
    mode: CacheMode,
    num_pages: int,
    page_size: int,
    device: torch.device | str,
    scales: CacheScales | ScaleSet | None,
) -> PagedCache:
    """Allocate the pages of every layer.

    Args:
        modules: what ``find_attention_modules`` returns for the model.
        dims: what :func:`measure_dims` returns for them.
        mode: how values are held.
        num_pages: pages of a layer.
        page_size: tokens of a page, a power of two up to 256.
        device: where the model runs.
        scales: of the checkpoint, read in the modes ``fp8`` and ``emulate``. A layer without a scale is held at 1.0,
            and a warning says so.

    Raises:
        EvaluationError: the mode is unknown, or the page size or the number of pages cannot be.
        ScaleError: a layer has another number of scales than heads, or an MLA layer two different ones.
    """
    if mode not in get_args(CacheMode):
        known = ", ".join(get_args(CacheMode))
        raise EvaluationError(f"unknown cache mode {mode!r}; known modes: {known}")
    if not is_page_size(page_size):
        raise EvaluationError(
            f"page_size is {page_size}, but must be a power of two up to {MAX_PAGE_SIZE}"
        )
    if num_pages < 1:
        raise EvaluationError(f"num_pages is {num_pages}, but a cache needs at least one page")
    chosen = _Scales(mode, scales)
    layers = {
        name: _build_layer(name, dims[name], mode, (num_pages, page_size), chosen, device)
        for name in modules
    }
    chosen.report()
    return PagedCache(layers, page_size, num_pages, bytes_per_token(dims, mode))


_UNQUANTISED: Mapping[CacheMode, torch.dtype] = {
    "bf16": torch.bfloat16,
    "emulate": torch.bfloat16,
    "float32": torch.float32,
}
"""The modes that hold numbers and not codes."""


class _Scales:
    """What each layer is held at, and which layers are at 1.0 because nobody gave a scale."""

    def __init__(self, mode: CacheMode, scales: CacheScales | ScaleSet | None) -> None:
        if isinstance(scales, ScaleSet):
            scales = CacheScales.from_scale_set(scales)
        self._scales = scales if mode in ("fp8", "emulate") else None
        self._expected = mode in ("fp8", "emulate")
        self._total = 0
        self._missing: list[str] = []
        quantises = self._expected or mode == "fp8-unit"
        name = scales.fp8_format if scales is not None else "e4m3fn"
        self.fmt = get_format(name) if quantises else None

    def of(self, layer: str, dims: LayerDims) -> tuple[Tensor, Tensor]:
        """Return the K and the V scale, float32 [1] or [kv_heads]."""
        found = self._scales.find(layer) if self._scales is not None else None
        k, v = found if found is not None else (None, None)
        if dims.attention == "mla":
            k = v = _one_of_both(layer, k, v)
        self._total += 2
        pair = []
        for stream, scale in (("k_scale", k), ("v_scale", v)):
            if scale is None:
                self._missing.append(f"{stream} of {layer}")
                scale = torch.ones(1)
            elif scale.numel() not in (1, dims.kv_heads):
                raise ScaleError(
                    f"{stream} of {layer} has {scale.numel()} values, but the layer caches {dims.kv_heads} heads; "
                    "give one, or one for each head"
                )
            pair.append(scale)
        return pair[0], pair[1]

    def report(self) -> None:
        """Log once what is held at 1.0 although the mode asks for calibrated scales."""
        if not self._expected or not self._missing:
            return
        if len(self._missing) == self._total:
            _LOG.warning(
                "all KV scales are missing and taken as 1.0: convert the checkpoint with fp8kv calibrate, or ask "
                "for the cache fp8-unit"
            )
            return
        _LOG.warning(
            "%d of %d KV scales are missing and taken as 1.0: %s%s",
            len(self._missing),
            self._total,
            ", ".join(self._missing[:4]),
            ", ..." if len(self._missing) > 4 else "",
        )


def _one_of_both(layer: str, k: Tensor | None, v: Tensor | None) -> Tensor | None:
    """Return the one scale of an MLA row."""
    if k is not None and v is not None and not torch.equal(k, v):
        raise ScaleError(
            f"{layer} is an MLA layer, whose V is a view of its K row, but its scales differ: "
            f"k_scale {k.tolist()}, v_scale {v.tolist()}; calibrate the checkpoint anew"
        )
    return k if k is not None else v


def _build_layer(
    name: str,
    dims: LayerDims,
    mode: CacheMode,
    places: tuple[int, int],
    scales: _Scales,
    device: torch.device | str,
) -> LayerCache:
    fmt = scales.fmt
    dtype = _UNQUANTISED.get(mode) or (fmt.dtype if fmt is not None else torch.bfloat16)
    k_scale, v_scale = (scale.to(device, torch.float32) for scale in scales.of(name, dims))
    if dims.attention == "mla":
        k, v, v_scale = torch.zeros(*places, dims.k_dim, dtype=dtype, device=device), None, k_scale
    else:
        shape = (*places, dims.kv_heads)
        k = torch.zeros(*shape, dims.k_dim, dtype=dtype, device=device)
        v = torch.zeros(*shape, dims.v_dim, dtype=dtype, device=device)
    return LayerCache(name, dims.attention, k, v, k_scale, v_scale, mode, v_dim=dims.v_dim, fmt=fmt)
