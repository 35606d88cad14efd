"""What a call of ``extend`` is made of, and what is checked of it before either kernel is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    FP8_TYPES,
    WIDE_TYPES,
    KernelArgumentError,
    require,
    require_cache_dtype,
    require_dtype,
    require_same_device,
    require_scale,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.layout import MAX_PAGE_SIZE, is_page_size

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class ExtendArguments:
    """The arguments of ``extend``, under the same names."""

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    k_cache: Tensor | None
    v_cache: Tensor | None
    page_table: Tensor | None
    prefix_lens: Tensor
    cu_seqlens: Tensor
    k_scale: Tensor
    v_scale: Tensor
    sm_scale: float
    max_new_tokens: int
    max_prefix_len: int
    causal: bool
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    out: Tensor
    lse: Tensor | None

    @property
    def keys(self) -> Tensor:
        """The tensor that shows what K is like: the new tokens' K, or the cache where that is all."""
        return _given("key", self.key, self.k_cache)

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.keys.shape[-2]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.kv_heads

    @property
    def k_dim(self) -> int:
        """Width of queries and keys."""
        return self.query.shape[-1]

    @property
    def v_dim(self) -> int:
        """Width of values and outputs."""
        return self.out.shape[-1]

    @property
    def sources(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What K and V are read from."""
        return self.key, self.value, self.k_cache, self.v_cache

    @property
    def is_quantised(self) -> bool:
        """Whether the cache holds codes; true without a cache, where it makes no difference."""
        return self.k_cache is None or self.k_cache.dtype in FP8_TYPES

    @property
    def page_size(self) -> int:
        """Tokens of a page; 1 without a cache."""
        return self.k_cache.shape[1] if self.k_cache is not None else 1

    def strides(self, *sources: Tensor | None) -> tuple[int, ...]:
        """Return the strides in the order of the kernels' parameters.

        Args:
            *sources: key, value, k_cache and v_cache as the kernel gets them.
        """
        key, value, k_cache, v_cache = sources
        counted = [
            (self.query, 2), (key, 2), (value, 2), (k_cache, 3), (v_cache, 3),
            (self.page_table, 1), (self.out, 2), (self.lse, 2),
        ]  # fmt: skip
        found: list[int] = []
        for tensor, count in counted:
            found += [0] * count if tensor is None else tensor.stride()[:count]
        return tuple(found)

    def check(self) -> None:
        """Raise unless the arguments fit each other and the contract.

        Raises:
            KernelArgumentError: naming the argument, what was found and what is required.
        """
        tensors = {name: found for name, found in vars(self).items() if isinstance(found, Tensor)}
        require_same_device(**tensors)
        require_shape("query", self.query, (None, None, None))
        require_dtype("query", self.query, WIDE_TYPES)
        tokens, q_heads, k_dim = self.query.shape
        batch = self.prefix_lens.shape[0]
        kv_heads = self.kv_heads
        v_dim = _given("value", self.value, self.v_cache).shape[-1]
        require(
            kv_heads > 0 and q_heads % kv_heads == 0,
            "the number of query heads", q_heads, f"a multiple of the {kv_heads} KV heads",
        )  # fmt: skip
        for name, width in (("query", k_dim), ("value", v_dim)):
            require(
                0 < width <= MAX_HEAD_DIM, f"the width of {name}", width, f"1 to {MAX_HEAD_DIM}"
            )
        self._check_new(tokens, kv_heads, v_dim)
        self._check_cache(batch, kv_heads, v_dim)
        require_shape("prefix_lens", self.prefix_lens, (None,))
        require_shape("cu_seqlens", self.cu_seqlens, (batch + 1,))
        for name in ("prefix_lens", "cu_seqlens"):
            require_dtype(name, tensors[name], (torch.int32,))
            require_unit_stride(name, tensors[name])
        require_scale("k_scale", self.k_scale, kv_heads)
        require_scale("v_scale", self.v_scale, kv_heads)
        require(self.sm_scale > 0, "sm_scale", self.sm_scale, "positive")
        require(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "at least 0")
        require(self.max_prefix_len >= 0, "max_prefix_len", self.max_prefix_len, "at least 0")
        if self.window is not None:
            require(self.causal, "window", self.window, "None where causal is False")
            require(self.window > 0, "window", self.window, "at least 1")
        if self.soft_cap is not None:
            require(self.soft_cap > 0, "soft_cap", self.soft_cap, "positive")
        if self.sinks is not None:
            require_shape("sinks", self.sinks, (q_heads,))
            require_dtype("sinks", self.sinks, (torch.float32,))
            require_unit_stride("sinks", self.sinks)
        require_shape("out", self.out, (tokens, q_heads, v_dim))
        require_dtype("out", self.out, FLOAT_TYPES)
        if self.lse is not None:
            require_shape("lse", self.lse, (tokens, q_heads))
            require_dtype("lse", self.lse, (torch.float32,))
        for name in ("query", "key", "value", "k_cache", "v_cache", "page_table", "out"):
            if name in tensors:
                require_unit_stride(name, tensors[name])

    def _check_new(self, tokens: int, kv_heads: int, v_dim: int) -> None:
        if self.key is None or self.value is None:
            one = "value" if self.key is None else "key"
            both = self.key is None and self.value is None
            require(both, one, "given", "None where the other of key and value is")
            return
        require_shape("key", self.key, (tokens, kv_heads, self.k_dim))
        require_shape("value", self.value, (tokens, kv_heads, v_dim))
        require_dtype("key", self.key, (*WIDE_TYPES, *FP8_TYPES))
        require_dtype("value", self.value, (self.key.dtype,))

    def _check_cache(self, batch: int, kv_heads: int, v_dim: int) -> None:
        if self.k_cache is None or self.v_cache is None or self.page_table is None:
            given = [
                name
                for name in ("k_cache", "v_cache", "page_table")
                if getattr(self, name) is not None
            ]
            require(
                not given,
                "k_cache, v_cache and page_table",
                f"given in part: {given}",
                "all or none",
            )
            require(
                self.max_prefix_len == 0, "max_prefix_len", self.max_prefix_len, "0 without a cache"
            )
            return
        page_size = self.k_cache.shape[1] if self.k_cache.dim() > 1 else 0
        require_shape("k_cache", self.k_cache, (None, page_size, kv_heads, self.k_dim))
        require_shape("v_cache", self.v_cache, (None, page_size, kv_heads, v_dim))
        require_cache_dtype("k_cache", self.k_cache, self.query)
        require_dtype("v_cache", self.v_cache, (self.k_cache.dtype,))
        require(
            is_page_size(page_size), "page_size", page_size, f"a power of two up to {MAX_PAGE_SIZE}"
        )
        require_shape("page_table", self.page_table, (batch, None))
        require_dtype("page_table", self.page_table, (torch.int32,))
        if self.key is not None and (self.key.dtype in FP8_TYPES or not self.is_quantised):
            require_dtype("key", self.key, (self.k_cache.dtype,))


def _given(name: str, new: Tensor | None, cache: Tensor | None) -> Tensor:
    tensor = new if new is not None else cache
    if tensor is None:
        raise KernelArgumentError(name, "None", "given where there is no cache")
    if tensor.dim() < 3:
        raise KernelArgumentError(
            f"the shape of {name}", list(tensor.shape), "[tokens, heads, dim]"
        )
    return tensor
