"""Decode steps as CUDA graphs: the host launches one graph where it would launch a thousand kernels.

A graph is recorded for one number of sequences and one bound of their lengths, and replayed with other tokens, pages
and lengths, which it finds in fixed buffers. So that a few graphs do for all batches:

* the number of sequences is rounded up to 1, 2, 4, a multiple of 8 up to 64, or one of 16; the rows in excess have
  length 0 and write nothing;
* the bound is rounded up to a power of two, from 256 tokens on. The decode kernels choose from it how they cut the
  sequences, and a bound of 128 Ki at 4 Ki tokens would cut them badly.

The first batch of a kind runs kernel by kernel, which compiles what is not compiled yet; the second is recorded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fp8kv.runtime.batch import Batch
from fp8kv.runtime.cuda_graphs import CudaRecorder, NotRecordable, Recorder
from fp8kv.runtime.paged_cache import PagedCache

_LOG = logging.getLogger(__name__)

_MIN_BOUND = 256
_MAX_GRAPHS = 64
_MIN_FREE_BYTES = 1 << 30


class PagedRunner(Protocol):
    """A model over a paged cache, such as :class:`~fp8kv.runtime.model_runner.ModelRunner`."""

    cache: PagedCache

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of each sequence's last new token, float32 ``[sequences, vocabulary]``."""


class DecodeGraphs:
    """Runs a model's decode steps as replayed graphs, and all other batches as they are.

    A model that cannot be recorded, because its code waits for the GPU, is named in one warning and runs kernel by
    kernel from then on. So does every model on a CPU.
    """

    def __init__(
        self,
        runner: PagedRunner,
        *,
        max_sequences: int,
        max_seq_len: int,
        enabled: bool = True,
        max_graphs: int = _MAX_GRAPHS,
        min_free_bytes: int = _MIN_FREE_BYTES,
        recorder: Recorder | None = None,
    ) -> None:
        """Wrap ``runner``.

        Args:
            runner: what computes the logits; it never waits for the GPU itself.
            max_sequences: larger batches are not recorded.
            max_seq_len: batches with longer sequences are not recorded.
            enabled: False makes this a plain way through to ``runner``.
            max_graphs: so many are kept at a time, those that were used last.
            min_free_bytes: with less free memory on the GPU no further graph is recorded.
            recorder: makes the graphs; by default torch does, on a GPU.
        """
        self._runner = runner
        self._max_sequences = max_sequences
        self._max_seq_len = max_seq_len
        self._max_graphs = max_graphs
        device = next(iter(runner.cache.layers.values())).k.device
        if enabled and recorder is None and device.type == "cuda":
            recorder = CudaRecorder(device, min_free_bytes=min_free_bytes)
        self._recorder = recorder if enabled else None
        self._rehearsed: set[tuple[int, int]] = set()
        self._graphs: OrderedDict[tuple[int, int], Callable[[], None]] = OrderedDict()
        self._inputs: _Inputs | None = None
        self._logits = torch.empty(0)

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept now."""
        return len(self._graphs)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of each sequence's last new token, float32 ``[sequences, vocabulary]``.

        The logits of a decode step lie in a buffer that the next one overwrites: read them, on the same stream, before
        it is launched.
        """
        count, length = batch.num_sequences, batch.max_seq_len
        is_too_large = count > self._max_sequences or length > self._max_seq_len
        if self._recorder is None or is_too_large or not batch.is_decode:
            return self._runner.forward(batch)
        if self._inputs is None:
            self._inputs = _Inputs(self._max_sequences, self._max_seq_len, self._runner.cache)
        self._inputs.fill(batch)
        size = round_up_sequences(count, self._max_sequences)
        key = (size, round_up_length(length, self._max_seq_len))
        try:
            self._run_recorded(key, self._recorder, self._inputs)
        except NotRecordable as reason:
            # what is wrong with the batch or the model, and not with recording it, is raised here
            logits = self._runner.forward(batch)
            self._give_up(reason)
            return logits
        return self._logits[:count]

    def close(self) -> None:
        """Drop all graphs and their memory; batches run kernel by kernel from now on."""
        self._recorder = self._inputs = None
        self._logits = torch.empty(0)
        self._graphs.clear()

    def _run_recorded(self, key: tuple[int, int], recorder: Recorder, inputs: _Inputs) -> None:
        """Put the logits of the batch in ``inputs``, padded to the sizes of ``key``, into their buffer."""
        replay = self._graphs.get(key)
        if replay is not None:
            self._graphs.move_to_end(key)
            replay()
            return
        run = partial(self._run, inputs.padded(*key))
        if key not in self._rehearsed:
            recorder.rehearse(run)
            self._rehearsed.add(key)
            return
        replay = recorder.record(run)
        if replay is None:
            run()
            return
        self._graphs[key] = replay
        # not before there is a new one: the graphs' memory lives as long as there are graphs
        if len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)
        replay()

    def _run(self, batch: Batch) -> None:
        logits = self._runner.forward(batch)
        if not self._logits.numel():
            self._logits = logits.new_empty(self._max_sequences, logits.shape[1])
        # one buffer for all: in memory of its own each graph would keep its logits, 33 MB for 64 rows of 128 Ki
        self._logits[: batch.num_sequences].copy_(logits)

    def _give_up(self, reason: NotRecordable) -> None:
        _LOG.warning(
            "decoding runs without CUDA graphs, because the model's forward cannot be recorded: %s",
            reason,
        )
        self.close()


def round_up_sequences(count: int, most: int) -> int:
    """Return how many rows a batch of ``count`` sequences is padded to: 1, 2, 4, 8, 16, ..., 64, 80, ..., ``most``."""
    step = 8 if count <= 64 else 16
    size = 1 << (count - 1).bit_length() if count <= 8 else -(-count // step) * step
    return min(size, most)


def round_up_length(length: int, most: int) -> int:
    """Return the bound that stands for sequences of ``length`` tokens: a power of two from 256 on, or ``most``."""
    return min(max(_MIN_BOUND, 1 << (length - 1).bit_length()), most)


class _Inputs:
    """The buffers in which graphs find a batch; rows behind its last sequence are padding."""

    def __init__(self, max_sequences: int, max_seq_len: int, cache: PagedCache) -> None:
        device = next(iter(cache.layers.values())).k.device
        max_pages = -(-max_seq_len // cache.page_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._token_ids = zeros(max_sequences, dtype=torch.int64)
        self._positions = zeros(max_sequences, dtype=torch.int64)
        self._slots = zeros(max_sequences, dtype=torch.int64) - 1
        self._page_table = zeros(max_sequences, max_pages)
        self._prefix_lens = zeros(max_sequences)
        self._seq_lens = zeros(max_sequences)
        self._cu_seqlens = torch.arange(max_sequences + 1, dtype=torch.int32, device=device)
        self._page_size = cache.page_size
        self._num_filled = 0

    def fill(self, batch: Batch) -> None:
        """Take over a decode batch, and make padding of the rows behind it."""
        count = batch.num_sequences
        for buffer, values in (
            (self._token_ids, batch.token_ids),
            (self._positions, batch.positions),
            (self._slots, batch.slots),
            (self._prefix_lens, batch.prefix_lens),
            (self._seq_lens, batch.seq_lens),
        ):
            buffer[:count].copy_(values)
        # what a row holds behind its sequence's last page has no meaning
        self._page_table[:count, : batch.page_table.shape[1]].copy_(batch.page_table)
        if count < self._num_filled:
            stale = slice(count, self._num_filled)
            self._slots[stale] = -1
            for buffer in (self._token_ids, self._positions, self._prefix_lens, self._seq_lens):
                buffer[stale] = 0
        self._num_filled = count

    def padded(self, size: int, bound: int) -> Batch:
        """Return the first ``size`` rows as a batch of sequences of up to ``bound`` tokens."""
        return Batch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            page_table=self._page_table[:size, : -(-bound // self._page_size)],
            prefix_lens=self._prefix_lens[:size],
            cu_seqlens=self._cu_seqlens[: size + 1],
            seq_lens=self._seq_lens[:size],
            max_new_tokens=1,
            max_prefix_len=bound - 1,
            max_seq_len=bound,
            num_decodes=size,
            max_prefill_prefix_len=0,
        )
