"""A model whose answers depend on every token that it reads back from its paged cache, and on nothing else."""

import hashlib

import torch

VOCABULARY = 259  # of the byte tokenizer: bytes and three special tokens
EOS = 257


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
        return self._logits(batch, [count - 1 for count in self._counts(batch)])

    def all_logits(self, batch):
        (count,) = self._counts(batch)
        rows = []
        for position in range(count):
            rows.append(self._logits(batch, [position])[0])
        return torch.stack(rows)

    def _counts(self, batch):
        return batch.cu_seqlens.diff().tolist()

    def _logits(self, batch, last):
        if self.fails:
            raise RuntimeError("the model broke")
        self.batches.append(batch)
        assert batch.slots.unique().numel() == batch.slots.numel(), "nothing is written twice"
        self.cache[batch.slots] = batch.token_ids
        rows = []
        for row, position in enumerate(last):
            start = int(batch.cu_seqlens[row])
            length = int(batch.prefix_lens[row]) + position + 1
            assert int(batch.positions[start + position]) == length - 1
            at = torch.arange(length)
            pages = batch.page_table[row][at // self.page_size].long()
            rows.append(self._answer(self.cache[pages * self.page_size + at % self.page_size]))
        return torch.stack(rows)

    def _answer(self, token_ids):
        assert int(token_ids.min()) >= 0, "what is read has been written"
        digest = hashlib.sha256(str(token_ids.tolist()).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        logits = torch.randn(VOCABULARY, generator=generator)
        # text of few letters, so that stop strings come up, and an end now and then
        logits[97:101] += 4
        logits[EOS] += 2.5
        return logits
