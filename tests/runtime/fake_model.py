"""A model whose answers depend on every token that it reads back from its paged cache, and engines over it."""

import hashlib
from collections import defaultdict
from dataclasses import replace
from functools import cache

import torch

from fp8kv.runtime.engine import Engine
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.requests import Request, join_outputs
from fp8kv.runtime.sampling import SamplingParameters

VOCABULARY = 259  # of the byte tokenizer: bytes and three special tokens
EOS = 257
POISON = ord("!")


class FakeModel:
    """Stores token ids where others store keys and values.

    A token that was written to a wrong slot, a page that was given away too early, or a prefix that is not the
    continuation's own changes the answer.
    """

    def __init__(self, num_pages, page_size):
        self.page_size = page_size
        self.cache = torch.full((num_pages * page_size,), -1)
        self.batches = []
        self.fails = False

    def forward(self, batch):
        return self.logits_at(batch, batch.cu_seqlens[1:] - 1)

    def logits_at(self, batch, rows):
        if self.fails:
            raise RuntimeError("the model broke")
        self.batches.append(batch)
        assert batch.slots.unique().numel() == batch.slots.numel(), "nothing is written twice"
        self.cache[batch.slots] = batch.token_ids
        return torch.stack([self._row(batch, int(row)) for row in rows])

    def _row(self, batch, row):
        sequence = int(torch.searchsorted(batch.cu_seqlens, row, right=True)) - 1
        length = int(batch.prefix_lens[sequence]) + row - int(batch.cu_seqlens[sequence]) + 1
        assert int(batch.positions[row]) == length - 1
        at = torch.arange(length)
        pages = batch.page_table[sequence][at // self.page_size].long()
        return self._answer(self.cache[pages * self.page_size + at % self.page_size].tolist())

    def _answer(self, token_ids):
        assert min(token_ids) >= 0, "what is read has been written"
        return answer(tuple(token_ids))


@cache
def answer(token_ids):
    """The logits behind ``token_ids``."""
    digest = hashlib.sha256(str(token_ids).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    logits = torch.randn(VOCABULARY, generator=generator)
    # text of the letters a to d, so that stop strings come up, and an end now and then
    logits[64:68] += 4
    logits[EOS] += 2.5
    if POISON in token_ids and len(token_ids) % 5 == 0:
        logits[7] = torch.nan
    return logits


class EngineKit:
    """Makes engines over fake models, and runs them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def make(self, num_pages=200, page_size=4, **limits):
        model = FakeModel(num_pages, page_size)
        engine = Engine(
            model,
            PageAllocator(num_pages, page_size),
            self.tokenizer,
            EngineLimits(VOCABULARY, **{"max_positions": None} | limits),
            eos_token_ids=[EOS],
            device="cpu",
        )
        return engine, model

    @staticmethod
    def request(text, **parameters):
        return Request(tuple(text.encode()), SamplingParameters(**{"max_tokens": 12} | parameters))

    def drain(self, engine):
        """Step to the end; return the outputs by request and continuation."""
        outputs = defaultdict(list)
        while engine.has_work:
            for output in engine.step():
                outputs[output.request_id, output.index].append(output)
        self.assert_clean(engine)
        return outputs

    @staticmethod
    def assert_clean(engine):
        status = engine.status
        assert (status.num_waiting, status.num_running) == (0, 0)
        assert status.num_free_pages == status.num_pages
        engine._allocator.check([])

    def alone(self, one):
        """What each continuation of a request says when nothing else is there and each runs by itself."""
        choices = []
        for index in range(one.parameters.n):
            engine, _ = self.make()
            seed = None if one.parameters.seed is None else one.parameters.seed + index
            engine.add(replace(one, parameters=replace(one.parameters, n=1, seed=seed)))
            (outputs,) = self.drain(engine).values()
            choices.append(join_outputs(outputs))
        return choices
