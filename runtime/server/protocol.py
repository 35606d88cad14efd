"""What clients may send: the parameters of OpenAI's API that the engine has, and a few that other engines added.

A parameter that exists and is not supported is refused by its name, unless its value asks for what is done anyway. So is
one that nobody knows. Ranges are :class:`~fp8kv.runtime.sampling.SamplingParameters`' affair; here are types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fp8kv.runtime.sampling import MAX_LOGPROBS, SamplingParameters
from fp8kv.runtime.server.api_errors import refuse
from fp8kv.runtime.server.strict_model import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    MESSAGE_NEUTRAL,
    Neutral,
    StrictModel,
    unsupported,
)

MAX_STOPS = 32
"""Stop strings of a request: each is looked for with every token."""

DEFAULT_MAX_TOKENS = 16
"""Of ``/v1/completions``, as in OpenAI's API."""

Prompt = str | tuple[int, ...]
"""A text, or the token ids of one."""


class StreamOptions(StrictModel):
    """Details of a stream.

    Attributes:
        include_usage: send a last chunk that counts the tokens.
    """

    neutral: ClassVar[Neutral] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None


def _read_stops(value: Any) -> tuple[str, ...] | None:
    """Return the stop strings of one, of a list of such, or of nothing."""
    if isinstance(value, str):
        return (value,)
    if value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        return None if value is None else tuple(value)
    raise PydanticCustomError("no_stops", "give a text or a list of texts")


class _Generation(StrictModel):
    """What both ways to ask have in common; None stands for the default, as in OpenAI's API.

    Attributes:
        model: the name under which the model is served.
        max_tokens: new tokens, at most.
        temperature: 1 by default; 0 takes the likeliest token.
        top_p: draw among the fewest tokens only whose probabilities sum to this.
        top_k: draw among so many likeliest tokens only; 0 and -1 stand for all. Not in OpenAI's API.
        seed: makes the draws repeatable.
        stop: texts that end the answer and are no part of it.
        n: answers to each prompt.
        stream: send what is there as it comes.
        stream_options: only with ``stream``.
        ignore_eos: go on after the end of sequence. Not in OpenAI's API.
        user: taken and not used.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[
        Annotated[tuple[str, ...], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_read_stops)
    ] = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("no_stream", "stream_options goes with stream: true only")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParameters:
        """Return what the engine is asked for.

        Raises:
            RequestError: a value is out of its range.
        """
        return SamplingParameters(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=None if self.top_k in (None, 0, -1) else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stop or (),
            logprobs=logprobs,
            n=self.num_choices,
            ignore_eos=bool(self.ignore_eos),
        )


def _read_prompts(value: Any) -> tuple[Prompt, ...]:
    """Return the prompts of one text, one list of token ids, or a list of such."""
    if isinstance(value, str):
        return (value,)
    if _is_token_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value:
        prompts = [one if isinstance(one, str) else _as_token_ids(one) for one in value]
        return tuple(prompts)
    raise _no_prompt()


def _as_token_ids(value: Any) -> tuple[int, ...]:
    if not _is_token_ids(value):
        raise _no_prompt()
    return tuple(value)


class CompletionRequest(_Generation):
    """The body of ``POST /v1/completions``.

    Attributes:
        prompt: texts or token ids; one may stand without a list around it.
        echo: let the answer begin with the prompt.
        logprobs: report the log-probability of each token and of this many likeliest ones; with ``echo`` those of
            the prompt, too. ``max_tokens`` may then be 0.
    """

    neutral: ClassVar[Neutral] = COMPLETION_NEUTRAL

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_read_prompts)]
    echo: bool | None = None
    logprobs: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_best_of(cls, data: Any) -> Any:
        if isinstance(data, dict) and "best_of" in data:
            # as many as are returned: nothing is chosen
            if data["best_of"] not in (None, data.get("n") or 1):
                raise unsupported("best_of")
            return {name: value for name, value in data.items() if name != "best_of"}
        return data


class TextPart(StrictModel):
    """A part of a message; other types, such as images, are refused."""

    type: Literal["text"]
    text: str


def _read_parts(value: Any) -> Any:
    """Return a message's parts; a text is one."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(StrictModel):
    """One message of a chat.

    Attributes:
        role: ``developer`` is another word for ``system``.
        content: a text, or parts that are joined.
        name: for templates that show it.
    """

    neutral: ClassVar[Neutral] = MESSAGE_NEUTRAL

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_read_parts)]
    name: str | None = None

    def to_template(self) -> dict[str, str]:
        """Return the message as chat templates know it."""
        content = "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class ChatRequest(_Generation):
    """The body of ``POST /v1/chat/completions``.

    Attributes:
        messages: the chat so far.
        max_completion_tokens: the newer name of ``max_tokens``; by default, all that there is room for.
        logprobs: report the log-probability of each token.
        top_logprobs: and of this many likeliest ones.
    """

    neutral: ClassVar[Neutral] = CHAT_NEUTRAL

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def asked_tokens(self) -> int | None:
        """Return how many new tokens are asked for; None where that is not said.

        Raises:
            ApiError: the two names have different values.
        """
        asked = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(asked) > 1:
            raise refuse(
                "max_tokens and max_completion_tokens differ: give one of them", "max_tokens"
            )
        return asked.pop() if asked else None

    def asked_logprobs(self) -> int | None:
        """Return how many alternatives are asked for; None where no logprobs are.

        Raises:
            ApiError: alternatives are asked for and logprobs are not, or too many.
        """
        if self.top_logprobs is None:
            return 0 if self.logprobs else None
        if not self.logprobs:
            raise refuse("top_logprobs goes with logprobs: true only", "top_logprobs")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise refuse(
                f"top_logprobs is {self.top_logprobs}: give 0 to {MAX_LOGPROBS}", "top_logprobs"
            )
        return self.top_logprobs


def _is_token_ids(value: Any) -> bool:
    # bool is an int to isinstance
    return isinstance(value, Sequence) and bool(value) and all(type(one) is int for one in value)


def _no_prompt() -> PydanticCustomError:
    return PydanticCustomError(
        "no_prompt", "give a text, a list of token ids, or a list of such; no list may be empty"
    )
