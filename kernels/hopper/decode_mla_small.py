"""MLA decode for up to 32 query heads on Hopper, stage 1: a program attends its heads to one split of a sequence.

Contract: as :mod:`fp8kv.kernels.decode_mla`, whose launcher checks the arguments and runs stage 2 (``combine``). With
one split the output and its natural log-sum-exp are final; with several, each split hands over its normalised output
and its log-sum-exp to base 2, -inf where it has no token.

Floor: memory, 576 bytes a token. :mod:`fp8kv.kernels.hopper.decode_mla_small_kernel` says how it is approached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.kernels.hopper.decode_mla_small_kernel import decode_kernel

MAX_HEADS = 32

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Shape:
    """The shape of a program.

    Attributes:
        heads: query heads of a program, 16 or 32.
        tile: tokens that it handles at a time.
        stages: tiles that shared memory holds; three are in use, the others on their way.
        warps: warps of a program.
        programs_per_sm: how many run on one multiprocessor at a time.
        slowdown: how much longer each of them takes than one alone does, measured.
    """

    heads: int
    tile: int
    stages: int
    warps: int
    programs_per_sm: int
    slowdown: float


_SHAPES = (
    Shape(heads=16, tile=32, stages=5, warps=4, programs_per_sm=2, slowdown=1.75),
    Shape(heads=32, tile=64, stages=4, warps=8, programs_per_sm=1, slowdown=1.0),
)


def choose_shape(heads: int) -> Shape:
    """Return the shape of the programs for so many query heads."""
    return next((shape for shape in _SHAPES if heads <= shape.heads), _SHAPES[-1])


def supports(query: Tensor, cache: Tensor) -> bool:
    """Say whether this kernel takes these tensors; the caller has checked what every MLA decode asks for.

    Args:
        query: [batch, heads, 576], bfloat16 or float16.
        cache: [pages, page_size, 576], float8_e4m3fn or float8_e5m2.
    """
    return (
        query.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.shape[1] <= MAX_HEADS
        and cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    )


def launch_decode_mla_small(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor,
    *,
    sm_scale: float,
    num_splits: int,
    result: Tensor,
    log_sum: Tensor | None,
    pdl: bool,
) -> None:
    """Attend every query to every split of its sequence. Checks nothing: see :func:`supports`.

    Args:
        query: [batch, heads, 576], bfloat16 or float16: the absorbed latent part, then the rope part.
        cache: [pages, page_size, 576] FP8 codes, page_size a power of two.
        page_table: [batch, max_pages] int32; entries past a sequence's last page are not read.
        seq_lens: [batch] int32, in tokens.
        scale: float32 of one element, of K and V.
        sm_scale: factor of the scores.
        num_splits: parts of a sequence, each a whole number of tiles.
        result: [batch, heads, num_splits, 512] to fill, of :func:`fp8kv.kernels.outputs.stage_one_outputs`.
        log_sum: [batch, heads, num_splits] to fill, or None, likewise.
        pdl: let the kernel behind this one start while the last programs end.
    """
    batch, heads, _ = query.shape
    shape = choose_shape(heads)
    head_blocks = -(-heads // shape.heads)
    decode_kernel[(batch * num_splits * head_blocks,)](
        query,
        cache,
        page_table,
        seq_lens,
        scale,
        result,
        log_sum,
        sm_scale * _LOG2_E,
        1.0 / _LOG2_E if num_splits == 1 else 1.0,
        heads,
        head_blocks,
        num_splits,
        cache.shape[1].bit_length() - 1,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        page_table.stride(0),
        *result.stride()[:3],
        *(log_sum.stride() if log_sum is not None else (0, 0, 0)),
        HEADS=shape.heads,
        TILE=shape.tile,
        STAGES=shape.stages,
        PDL=pdl,
        num_warps=shape.warps,
    )
