"""Which tokens the next forward pass computes, and who holds which pages: continuous batching with chunked prefill.

Every step has a budget of tokens. Continuations that decode come first, one token each; what is left of the budget
goes to prompts, the oldest first, a long one in chunks over several steps. A continuation is admitted when the pages
of all its present tokens are free, so only decoding can run out of pages. Then the latest admitted continuation gives
its pages back and waits at the head of the queue; it is recomputed from its tokens, prompt and generated alike, when
there is room again. The oldest is never taken from, so it always ends, and everybody does.

No tensors here: pages, counts and lists of token ids only.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fp8kv.runtime.paging import OutOfPages, PageAllocator


def _no_pages() -> array[int]:
    return array("i")


@dataclass(eq=False)
class Continuation:
    """One prompt being continued; the scheduler keeps the page fields.

    Attributes:
        request_id: of the request.
        index: among the request's continuations.
        token_ids: the prompt's tokens and those generated.
        num_prompt_tokens: how many of them are the prompt's.
        pages: where its keys and values lie, in order; an array, which a batch copies at one go.
        num_cached: how many tokens are in ``pages``, or will be when the passes that were launched are done.
        num_registered: how many of ``pages`` are full and offered for reuse.
        num_unread: tokens behind ``token_ids`` that the device is to choose, or has chosen and nobody has read. When a
            pass is scheduled, that is one at most.
        is_done: nothing follows the unread ones.
    """

    request_id: int
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    pages: array[int] = field(default_factory=_no_pages)
    num_cached: int = 0
    num_registered: int = 0
    num_unread: int = 0
    is_done: bool = False

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache: one while decoding, more in a prefill."""
        return len(self.token_ids) + self.num_unread - self.num_cached

    @property
    def num_generated(self) -> int:
        """Tokens beyond the prompt, unread ones among them."""
        return len(self.token_ids) + self.num_unread - self.num_prompt_tokens


@dataclass(frozen=True)
class Work:
    """What the next forward pass does for one continuation.

    Attributes:
        continuation: whose turn it is.
        num_tokens: how many of its pending tokens are computed.
    """

    continuation: Continuation
    num_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute; 0 stands for the unread one."""
        start = self.continuation.num_cached
        return self.continuation.token_ids[start : start + self.num_tokens] or [0]

    @property
    def is_last_chunk(self) -> bool:
        """Whether nothing stays pending, so that the last logits choose the next token."""
        return self.num_tokens == self.continuation.num_pending


class Scheduler:
    """Chooses the work of every step.

    Attributes:
        allocator: of the pages.
        max_batch_tokens: tokens of a step, at most.
        max_sequences: continuations that hold pages at one time, at most.
        num_preemptions: how often a continuation lost its pages.
        num_reused_tokens: tokens that were found in the cache on admission.
    """

    def __init__(
        self, allocator: PageAllocator, *, max_batch_tokens: int, max_sequences: int
    ) -> None:
        self.allocator = allocator
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.num_preemptions = 0
        self.num_reused_tokens = 0
        self._waiting: deque[Continuation] = deque()
        self._running: list[Continuation] = []  # in the order of admission

    @property
    def num_waiting(self) -> int:
        """Continuations that hold no pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Continuations that hold pages."""
        return len(self._running)

    def add(self, continuation: Continuation) -> None:
        """Queue ``continuation``, last."""
        self._waiting.append(continuation)

    def add_first(self, continuations: Sequence[Continuation]) -> None:
        """Queue ``continuations`` before all that wait, in their order."""
        self._waiting.extendleft(reversed(continuations))

    def schedule(self) -> list[Work]:
        """Return the work of the next forward pass, and see to it that its pages are there.

        Only the last of it can leave tokens pending, because it takes the rest of the budget.

        The list is empty only where all who run are done and nobody waits for anything but their pages, provided that
        every continuation that was added fits into the cache on its own.
        """
        # all who run get a token at least: nobody is admitted to a step whose budget they take up
        work = [Work(continuation, 1) for continuation in self._make_room()]
        budget = self.max_batch_tokens - len(work)
        for continuation in self._running:
            if continuation.num_pending > 1 and budget > 0:
                work.append(Work(continuation, min(continuation.num_pending, budget)))
                budget -= work[-1].num_tokens
        # who was preempted just now needs all the pages that it gave back, of which one is taken: it waits
        while budget > 0 and self._admit():
            work.append(Work(self._running[-1], min(self._running[-1].num_pending, budget)))
            budget -= work[-1].num_tokens
        return work

    def advance(self, work: Sequence[Work]) -> None:
        """Note that the forward pass of ``work`` is launched: later passes find its tokens in the cache.

        So full pages can be shared from now on, as far as their tokens are known.
        """
        for part in work:
            continuation = part.continuation
            continuation.num_cached += part.num_tokens
            num_known = min(continuation.num_cached, len(continuation.token_ids))
            num_full = num_known // self.allocator.page_size
            if num_full > continuation.num_registered:
                self.allocator.register(continuation.token_ids, continuation.pages, num_known)
                continuation.num_registered = num_full

    def remove(self, continuation: Continuation) -> None:
        """Forget ``continuation``, wherever it is, and give its pages back."""
        if continuation in self._running:
            self._running.remove(continuation)
            self._release(continuation)
        elif continuation in self._waiting:
            self._waiting.remove(continuation)

    def discard(self, continuation: Continuation) -> None:
        """Forget ``continuation`` and what its pages hold, which nobody is to read again."""
        self.allocator.forget(continuation.pages)
        self.remove(continuation)

    def _make_room(self) -> list[Continuation]:
        """Return who decodes, each with a page for its next token; the latest may lose theirs for it."""
        decoding: list[Continuation] = []
        position = 0
        # the list grows shorter at its end only, so nobody who was counted already is taken from
        while position < len(self._running):
            continuation = self._running[position]
            if continuation.num_pending == 1 and not continuation.is_done:
                while not self._grow(continuation):
                    self._preempt_latest()
                    if position == len(self._running):  # it was the latest itself
                        return decoding
                decoding.append(continuation)
            position += 1
        return decoding

    def _grow(self, continuation: Continuation) -> bool:
        if continuation.num_cached < len(continuation.pages) * self.allocator.page_size:
            return True
        try:
            continuation.pages.extend(self.allocator.allocate(1))
        except OutOfPages:
            return False
        return True

    def _preempt_latest(self) -> None:
        latest = self._running.pop()
        if latest.is_done:
            # nobody knows yet whether what it holds can be read again
            self.allocator.forget(latest.pages)
            self._release(latest)
            return
        self._release(latest)
        self._waiting.appendleft(latest)
        self.num_preemptions += 1

    def _admit(self) -> bool:
        """Start the first that waits, if there are a seat and pages for all its tokens."""
        if not self._waiting or len(self._running) >= self.max_sequences:
            return False
        continuation = self._waiting[0]
        if continuation.num_unread:  # preempted just now
            return False
        # the last token is always computed: its logits are what is wanted
        pages = self.allocator.match_prefix(continuation.token_ids[:-1])
        num_tokens = len(continuation.token_ids)
        num_missing = -(-num_tokens // self.allocator.page_size) - len(pages)
        try:
            continuation.pages = array("i", pages + self.allocator.allocate(num_missing))
        except OutOfPages:
            self.allocator.free(pages)
            return False
        continuation.num_registered = len(pages)
        continuation.num_cached = len(pages) * self.allocator.page_size
        self.num_reused_tokens += continuation.num_cached
        self._running.append(self._waiting.popleft())
        return True

    def _release(self, continuation: Continuation) -> None:
        self.allocator.free(continuation.pages)
        continuation.pages = _no_pages()
        continuation.num_cached = 0
