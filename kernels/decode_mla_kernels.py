"""Which kernel is the first stage of :mod:`fp8kv.kernels.decode_mla`, and into how many splits it cuts a sequence."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fp8kv.kernels import decode_mla_portable, decode_mla_unquantised
from fp8kv.kernels.splits import choose_splits

_HAS_GLUON = importlib.util.find_spec("triton.experimental.gluon") is not None
if _HAS_GLUON:
    from fp8kv.kernels.hopper import decode_mla_large, decode_mla_small


@dataclass(frozen=True)
class Kernel:
    """A first stage, and what the number of splits depends on.

    Attributes:
        launch: its launcher.
        heads: query heads of one program.
        tile: tokens that a program handles at a time.
        programs_per_sm: how many run on one multiprocessor at a time.
        slowdown: how much longer each of them takes than one alone does.
    """

    launch: Callable[..., None]
    heads: int
    tile: int
    programs_per_sm: int
    slowdown: float

    def splits(self, query: Tensor, max_seq_len: int) -> int:
        """Return how many parts the sequences of these queries are cut into."""
        if not query.is_cuda:
            return 1
        return _count_splits(
            query.shape[0] * -(-query.shape[1] // self.heads),
            max_seq_len,
            torch.cuda.get_device_properties(query.device).multi_processor_count,
            self.tile,
            self.programs_per_sm,
            self.slowdown,
        )


def choose_kernel(query: Tensor, cache: Tensor) -> Kernel:
    """Return the first stage for these tensors, which have been checked: the GPU's own where there is one."""
    if _HAS_GLUON and decode_mla_small.supports(query, cache):
        shape = decode_mla_small.choose_shape(query.shape[1])
        return Kernel(
            decode_mla_small.launch_decode_mla_small,
            heads=shape.heads,
            tile=shape.tile,
            programs_per_sm=shape.programs_per_sm,
            slowdown=shape.slowdown,
        )
    if _HAS_GLUON and decode_mla_large.supports(query, cache):
        return Kernel(
            decode_mla_large.launch_decode_mla_large,
            heads=decode_mla_large.HEADS_PER_PROGRAM,
            tile=decode_mla_large.TILE_TOKENS,
            programs_per_sm=1,
            slowdown=1.0,
        )
    if cache.dtype == query.dtype:
        wide = decode_mla_unquantised.choose_shape(query.shape[1], query.device)
        return Kernel(
            decode_mla_unquantised.launch_decode_mla_unquantised,
            heads=wide.heads,
            tile=wide.tile,
            programs_per_sm=wide.programs_per_sm,
            slowdown=1.4,
        )
    return Kernel(
        decode_mla_portable.launch_decode_mla_portable,
        heads=decode_mla_portable.HEADS_PER_PROGRAM,
        tile=decode_mla_portable.TILE_TOKENS,
        programs_per_sm=2,
        slowdown=1.4,
    )


@lru_cache(maxsize=1024)  # every layer of a model asks the same
def _count_splits(
    programs: int, max_seq_len: int, sms: int, tile: int, programs_per_sm: int, slowdown: float
) -> int:
    tiles = -(-max_seq_len // tile)

    def duration(splits: int) -> float:
        waves: float = -(-programs * splits // sms)
        if waves > 1:
            waves = -(-programs * splits // (sms * programs_per_sm)) * slowdown
        return waves * -(-tiles // splits)

    # A multiprocessor without work is worth a short split; a further program beside one that runs is not.
    alone = choose_splits(programs, max_seq_len, tile, sms, min_tokens=64)
    shared = choose_splits(
        programs, max_seq_len, tile, sms, ctas_per_sm=programs_per_sm, min_tokens=768
    )
    return min(alone, shared, key=duration)
