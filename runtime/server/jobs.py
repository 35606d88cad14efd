"""What goes from the event loop to the engine's thread, and what comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fp8kv.runtime.requests import Output, TokenLogprob
from fp8kv.runtime.sampling import SamplingParameters


class EngineStopped(Exception):
    """The engine takes no more jobs and ended those that it had.

    Attributes:
        is_failure: whether an error of the engine did it, and nobody's wish.
    """

    def __init__(self, message: str, *, is_failure: bool) -> None:
        super().__init__(message)
        self.is_failure = is_failure


@dataclass(frozen=True)
class Work:
    """What one HTTP request wants of the engine.

    Attributes:
        prompts: token ids of each.
        parameters: how they are continued; None where they are not.
        num_alternatives: score the prompts' own tokens, with so many alternatives; None does not.
    """

    prompts: tuple[tuple[int, ...], ...]
    parameters: SamplingParameters | None
    num_alternatives: int | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of a prompt: of every token but the first."""

    prompt: int
    entries: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Accepted:
    """All prompts are scored, and all that is to be generated is in the engine."""


@dataclass(frozen=True)
class Step:
    """What a step added to a continuation of a prompt."""

    prompt: int
    output: Output


Event = Scored | Accepted | Step | Exception
"""In this order; an exception is the last."""


@dataclass(eq=False)
class Job:
    """Work under way.

    Attributes:
        work: what is wanted.
        events: what came of it; the event loop's.
        num_scored: prompts that are scored; the thread's.
        request_ids: of the engine; the thread's.
    """

    work: Work
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    num_scored: int = 0
    request_ids: list[int] = field(default_factory=list)
