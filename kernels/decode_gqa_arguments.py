"""What a call of ``decode_gqa`` is made of, and what is checked of it before a kernel is launched. Needs torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
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
# Copies of 16 bytes, and the copy engine, want rows at multiples of this.
_ALIGNMENT = 16


@dataclass(frozen=True)
class DecodeGqaArguments:
    """The arguments of ``decode_gqa``, under the same names."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    k_scale: Tensor
    v_scale: Tensor
    sm_scale: float
    max_seq_len: int
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    pdl: bool

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.query.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads of the cache."""
        return self.k_cache.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.kv_heads

    @property
    def k_dim(self) -> int:
        """Width of queries and keys."""
        return self.query.shape[2]

    @property
    def v_dim(self) -> int:
        """Width of values and outputs."""
        return self.v_cache.shape[3]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k_cache.shape[1]

    @property
    def longest_span(self) -> int:
        """The largest number of tokens that a query sees."""
        return min(self.max_seq_len, self.window) if self.window else self.max_seq_len

    @property
    def multiprocessors(self) -> int:
        """Multiprocessors of the GPU; 1 where there is none, in Triton's interpreter."""
        if self.query.device.type != "cuda":
            return 1
        properties = torch.cuda.get_device_properties(self.query.device)
        return int(properties.multi_processor_count)


@dataclass(frozen=True)
class StageOneOutput:
    """Where the first stage writes.

    Attributes:
        result: [batch, q_heads, splits, v_dim]; last stride 1.
        log_sum: [batch, q_heads, splits] float32, or None where nobody asked for it.
        final: there is one split and ``result`` is the output, ``log_sum`` natural, sinks included; else ``result`` is
            float32 and ``log_sum`` in log2 units, for ``combine``.
    """

    result: Tensor
    log_sum: Tensor | None
    final: bool


def check_arguments(arguments: DecodeGqaArguments, num_splits: int | None) -> None:
    """Raise unless the arguments fit together.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device, stride or value does not fit.
    """
    a = arguments
    require_same_device(
        query=a.query,
        k_cache=a.k_cache,
        v_cache=a.v_cache,
        page_table=a.page_table,
        seq_lens=a.seq_lens,
        k_scale=a.k_scale if isinstance(a.k_scale, Tensor) else None,
        v_scale=a.v_scale if isinstance(a.v_scale, Tensor) else None,
        sinks=a.sinks,
    )
    require_shape("query", a.query, (None, None, None))
    batch, q_heads, k_dim = a.query.shape
    require_dtype("query", a.query, FLOAT_TYPES)
    require_unit_stride("query", a.query)
    require_shape("k_cache", a.k_cache, (None, None, None, k_dim))
    pages, page_size, kv_heads, _ = a.k_cache.shape
    require_shape("v_cache", a.v_cache, (pages, page_size, kv_heads, None))
    require(
        kv_heads > 0 and q_heads % kv_heads == 0,
        "the number of heads of query",
        q_heads,
        f"a multiple of the {kv_heads} heads of k_cache",
    )
    require(pages > 0, "the number of pages of k_cache", pages, "at least 1")
    require(
        is_page_size(page_size), "page_size", page_size, f"a power of two up to {MAX_PAGE_SIZE}"
    )
    require_cache_dtype("k_cache", a.k_cache, a.query)
    require_dtype("v_cache", a.v_cache, (a.k_cache.dtype,))
    for name, cache in (("k_cache", a.k_cache), ("v_cache", a.v_cache)):
        _check_rows(name, cache)
    require_shape("page_table", a.page_table, (batch, None))
    require_dtype("page_table", a.page_table, (torch.int32,))
    require_unit_stride("page_table", a.page_table)
    columns = a.page_table.shape[1]
    require(columns > 0 or batch == 0, "the number of columns of page_table", columns, "at least 1")
    require_shape("seq_lens", a.seq_lens, (batch,))
    require_dtype("seq_lens", a.seq_lens, (torch.int32,))
    require_unit_stride("seq_lens", a.seq_lens)
    require_scale("k_scale", a.k_scale, kv_heads)
    require_scale("v_scale", a.v_scale, kv_heads)
    require(a.sm_scale > 0, "sm_scale", a.sm_scale, "positive")
    require(a.max_seq_len >= 0, "max_seq_len", a.max_seq_len, "0 or more")
    require(a.window is None or a.window > 0, "window", a.window, "None or at least 1")
    require(a.soft_cap is None or a.soft_cap > 0, "soft_cap", a.soft_cap, "None or positive")
    require(num_splits is None or num_splits > 0, "num_splits", num_splits, "None or at least 1")
    if a.sinks is not None:
        require_shape("sinks", a.sinks, (q_heads,))
        require_dtype("sinks", a.sinks, (torch.float32,))
        require_unit_stride("sinks", a.sinks)


def check_outputs(
    arguments: DecodeGqaArguments, out: Tensor, out_dtype: torch.dtype | None, lse: Tensor | None
) -> None:
    """Raise unless ``out`` and ``lse`` can take the result.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit.
    """
    require_same_device(query=arguments.query, out=out, lse=lse)
    batch, q_heads, _ = arguments.query.shape
    require_shape("out", out, (batch, q_heads, arguments.v_dim))
    require_dtype("out", out, FLOAT_TYPES if out_dtype is None else (out_dtype,))
    require_unit_stride("out", out)
    if lse is not None:
        require_shape("lse", lse, (batch, q_heads))
        require_dtype("lse", lse, (torch.float32,))


def _check_rows(name: str, cache: Tensor) -> None:
    head_dim = cache.shape[3]
    require(
        0 < head_dim <= MAX_HEAD_DIM and head_dim % _ALIGNMENT == 0,
        f"the head dimension of {name}",
        head_dim,
        f"a multiple of {_ALIGNMENT} up to {MAX_HEAD_DIM}",
    )
    require_unit_stride(name, cache)
    aligned = all(stride % _ALIGNMENT == 0 for stride in cache.stride()[:-1])
    require(aligned, f"the strides of {name}", cache.stride(), f"multiples of {_ALIGNMENT}")
    require(
        cache.data_ptr() % _ALIGNMENT == 0,
        f"the address of {name}",
        hex(cache.data_ptr()),
        f"a multiple of {_ALIGNMENT}",
    )
