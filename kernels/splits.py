"""How many parts a sequence is cut into, so that a decode step keeps the whole GPU busy. Needs no torch.

One query token reads a long cache and computes little; a sequence and head alone would occupy one multiprocessor. So
the decode kernels cut every sequence into splits that run side by side, and :mod:`fp8kv.kernels.combine` puts their
results together. The count is chosen on the host from upper bounds, because a CUDA graph fixes it; each split finds its
tokens on the device from the true length.
"""

from __future__ import annotations

MAX_SPLITS = 256


def choose_splits(
    work_items: int,
    max_seq_len: int,
    tile: int,
    num_sms: int,
    *,
    ctas_per_sm: int = 1,
    min_tokens: int = 256,
    max_splits: int = MAX_SPLITS,
    startup_tiles: float = 2.0,
) -> int:
    """Return the number of splits of every sequence.

    The programs run in waves of ``num_sms * ctas_per_sm``. With S splits there are ``ceil(work_items * S / wave)``
    waves, and each lasts as long as the largest split, ``ceil(tiles / S)`` tiles, plus the start-up of a program. The S
    that makes the sum smallest is taken, and of several equally good ones the smallest, since every split costs stage 2
    one more partial result to read.

    Args:
        work_items: programs per split: batch x heads of the cache x row tiles.
        max_seq_len: tokens of the longest sequence; an upper bound will do.
        tile: tokens that a program handles at a time; splits are made of whole tiles.
        num_sms: multiprocessors of the GPU.
        ctas_per_sm: programs that run on one multiprocessor at a time.
        min_tokens: a split below this many tokens costs more than it saves.
        max_splits: upper limit, at least 1.
        startup_tiles: what starting a program costs, in tiles.

    Returns:
        A number between 1 and ``max_splits``.

    Raises:
        ValueError: a count is not positive.
    """
    counts = {
        "tile": tile,
        "num_sms": num_sms,
        "ctas_per_sm": ctas_per_sm,
        "min_tokens": min_tokens,
        "max_splits": max_splits,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, but must be at least 1")
    wave = num_sms * ctas_per_sm
    tiles = max(1, -(-max_seq_len // tile))
    # Past one full wave per work item more splits shorten nothing.
    most = min(max_splits, max(1, max_seq_len // min_tokens), tiles, max(1, wave))
    best, least = 1, float("inf")
    for splits in range(1, most + 1):
        waves = -(-max(work_items, 1) * splits // wave)
        time = waves * (-(-tiles // splits) + startup_tiles)
        if time < least:
            best, least = splits, time
    return best
