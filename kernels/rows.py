"""Strided tensors as rows: how the dimensions of a view fold into the three that a kernel walks. Needs torch alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fp8kv.kernels.arguments import KernelArgumentError, require


class Rows(NamedTuple):
    """Two tensors of one shape as [outer, inner, width], with the strides of each; ``width`` is contiguous in both."""

    outer: int
    inner: int
    width: int
    source_outer: int
    target_outer: int
    source_inner: int
    target_inner: int

    @property
    def contiguous(self) -> bool:
        """Whether both tensors are one run of memory."""
        return self.outer * self.inner == 1


def fold_rows(source: Tensor, target: Tensor, *, keep_heads: bool) -> Rows:
    """Fold the dimensions of two tensors of one shape into [outer, inner, width].

    Args:
        source: any shape of at least one dimension, last stride 1.
        target: the same.
        keep_heads: keep the last two dimensions as ``inner`` and ``width``.

    Raises:
        KernelArgumentError: the strides do not fold, or there are more rows than an int32 counts.
    """
    dims = list(zip(source.shape, source.stride(), target.stride(), strict=True))
    kept = 2 if keep_heads else 1
    # The stride of a dimension of one element says nothing.
    above = [dim for dim in dims[:-kept] if dim[0] != 1]
    width = (source.shape[-1], 1, 1)
    if keep_heads:
        folded = [*(_fold(above) or [(1, 0, 0)]), dims[-2], width]
    else:
        folded = _fold([*above, width])
    if len(folded) > 3:
        found = f"{list(source.stride())} for x and {list(target.stride())} for out"
        raise KernelArgumentError("the strides", found, "such as fold into [tokens, heads, dim]")
    if len(folded) == 2:
        folded.insert(1, (1, 0, 0))
    outer, inner, width = [(1, 0, 0)] * (3 - len(folded)) + folded
    require(outer[0] * inner[0] < 1 << 31, "the rows of x", outer[0] * inner[0], "below 2^31")
    return Rows(outer[0], inner[0], width[0], *outer[1:], *inner[1:])


def _fold(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Merge neighbouring dimensions (size, stride, stride) that both strides cross evenly."""
    folded: list[tuple[int, int, int]] = []
    for size, *strides in reversed(dims):
        if folded:
            below, *steps = folded[-1]
            if all(stride == below * step for stride, step in zip(strides, steps, strict=True)):
                folded[-1] = (size * below, steps[0], steps[1])
                continue
        folded.append((size, strides[0], strides[1]))
    return folded[::-1]
