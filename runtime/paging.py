"""Who holds which page of the cache: reference counts, and pages that are found again by what they hold.

Counts and hashes only; the cache's tensors are elsewhere. A page is always exactly one of

- used: one or more sequences hold it;
- cached: nobody holds it, but its keys and values are those of a known prefix, so that it can be shared again;
- free: nobody holds it and nothing is known of its content.

Full pages are known under a chain of hashes: that of a page covers its own tokens and, through its parent's hash, all
tokens before it. Equal hashes therefore mean equal prefixes. SHA-256, because whoever could make two prefixes collide
could read from another's cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from fp8kv.recipes.errors import RequestError


class OutOfPages(Exception):
    """Fewer pages can be had than were asked for. Nothing was taken; the scheduler waits or preempts."""


class PageAccountingError(Exception):
    """The count of the pages is wrong. A bug in the engine, which no request can cause."""


class PageAllocator:
    """Hands out the pages of one cache.

    Not safe for threads. Every method takes time in proportion to the pages and tokens that it is given, whatever the
    size of the cache, but for :meth:`check`.

    Attributes:
        num_pages: of the cache; they are numbered from 0.
        page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise RequestError(f"{name} is {value}: give at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))
        self._references: dict[int, int] = {}  # of the used pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hash_of: dict[int, bytes] = {}  # of every page whose content is known, used or cached
        self._page_of: dict[
            bytes, int
        ] = {}  # of several pages with equal content, the one that is shared

    @property
    def num_free(self) -> int:
        """Pages that :meth:`allocate` can give: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose content can be found again."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` pages with one reference each, whose content is undefined.

        Free pages are taken first; then the cached ones, least recently used first, whose content is forgotten.

        Raises:
            OutOfPages: fewer can be had; nothing was taken.
        """
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are wanted and {self.num_free} can be had")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._references.update(dict.fromkeys(pages, 1))
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Take a reference from each of ``pages``, which are a sequence's in order.

        What nobody holds any more is kept for reuse if its content is known. The last page of a sequence is evicted
        before the first, because a page is of no use without those before it.

        Raises:
            PageAccountingError: nobody holds one of them.
        """
        for page in reversed(pages):
            references = self._held(page)
            if references > 1:
                self._references[page] = references - 1
            else:
                del self._references[page]
                self._retire(page)

    def register(
        self, token_ids: Sequence[int], pages: Sequence[int], num_tokens: int | None = None
    ) -> None:
        """Offer the full pages of a sequence for reuse.

        Call it after the forward pass that filled them, as often as pages become full: only those that are new are
        hashed. Nobody may write to a registered page again.

        Args:
            token_ids: the sequence from its first token; those beyond the last full page are ignored.
            pages: where their keys and values lie, in order, at least the full ones.
            num_tokens: how many of the tokens are in the pages; None for as many as these hold.

        Raises:
            PageAccountingError: nobody holds one of the pages.
        """
        known = len(token_ids) if num_tokens is None else num_tokens
        num_full = min(known // self.page_size, len(pages))
        first = num_full
        while first > 0 and pages[first - 1] not in self._hash_of:
            first -= 1
        parent = self._hash_of[pages[first - 1]] if first else b""
        hashes = self._hashes(token_ids, first, num_full, parent)
        for page, page_hash in zip(pages[first:num_full], hashes, strict=True):
            self._held(page)
            self._hash_of[page] = page_hash
            self._page_of.setdefault(page_hash, page)

    def forget(self, pages: Iterable[int]) -> None:
        """Offer ``pages``, which somebody must hold, for reuse no longer: what they hold is not to be read again.

        Raises:
            PageAccountingError: nobody holds one of them.
        """
        for page in pages:
            self._held(page)
            page_hash = self._hash_of.pop(page, None)
            if page_hash is not None and self._page_of.get(page_hash) == page:
                del self._page_of[page_hash]

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Return the pages of the longest known prefix of ``token_ids``, with a reference added to each.

        They hold ``page_size`` tokens each, in order. Give a prompt without its last token: that one must be computed
        in any case, for its logits. Whoever does not want the pages after all gives them to :meth:`free`.
        """
        pages: list[int] = []
        for page_hash in self._hashes(token_ids, 0, len(token_ids) // self.page_size, b""):
            page = self._page_of.get(page_hash)
            if page is None:
                break
            self._cached.pop(page, None)
            self._references[page] = self._references.get(page, 0) + 1
            pages.append(page)
        return pages

    def check(self, page_tables: Iterable[Sequence[int]] | None = None) -> None:
        """Verify that every page is exactly one of used, cached and free, and that the counts and hashes agree.

        Args:
            page_tables: the pages of every sequence, where the caller knows them all; the references are then
                compared with these.

        Raises:
            PageAccountingError: something does not add up.
        """
        found = Counter([*self._free, *self._cached, *self._references])
        if found != Counter(range(self.num_pages)):
            raise PageAccountingError(
                f"{len(self._free)} free, {len(self._cached)} cached and {len(self._references)} used pages "
                f"are not the {self.num_pages} pages of the cache, once each"
            )
        for page, page_hash in self._hash_of.items():
            if page not in self._cached and page not in self._references:
                raise PageAccountingError(f"page {page} is free, but its content is known")
            if page in self._cached and self._page_of.get(page_hash) != page:
                raise PageAccountingError(f"page {page} is cached, but cannot be found")
        for page_hash, page in self._page_of.items():
            if self._hash_of.get(page) != page_hash:
                raise PageAccountingError(f"page {page} is found under a hash that is not its own")
        if page_tables is not None:
            held = Counter(page for table in page_tables for page in table)
            if held != self._references:
                wrong = sorted(
                    p for p in held | self._references if held[p] != self._references.get(p, 0)
                )
                raise PageAccountingError(
                    f"page {wrong[0]} has {self._references.get(wrong[0], 0)} references, "
                    f"but {held[wrong[0]]} sequences hold it"
                )

    def _held(self, page: int) -> int:
        references = self._references.get(page)
        if references is None:
            raise PageAccountingError(f"page {page} is used by nobody, yet somebody speaks for it")
        return references

    def _retire(self, page: int) -> None:
        page_hash = self._hash_of.get(page)
        if page_hash is None:
            self._free.append(page)
            return
        shared = self._page_of.setdefault(page_hash, page)
        if shared == page:
            self._cached[page] = None
            return
        # another page holds the same: it stays, and counts as just used
        del self._hash_of[page]
        self._free.append(page)
        if shared in self._cached:
            self._cached.move_to_end(shared)

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

    def _hashes(
        self, token_ids: Sequence[int], first: int, last: int, parent: bytes
    ) -> Iterator[bytes]:
        """Yield the hash of each full page from ``first`` to before ``last``; ``parent`` is that of the one before."""
        for page in range(first, last):
            content = array("q", token_ids[page * self.page_size : (page + 1) * self.page_size])
            parent = hashlib.sha256(parent + content.tobytes()).digest()
            yield parent
