"""``/v1/completions``: prompts as they are, texts or tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fp8kv.runtime.requests import Choice, Output
from fp8kv.runtime.server.api_errors import refuse
from fp8kv.runtime.server.forms import Form
from fp8kv.runtime.server.jobs import Work
from fp8kv.runtime.server.logprobs import TextOffsets, completion_logprobs
from fp8kv.runtime.server.protocol import DEFAULT_MAX_TOKENS, CompletionRequest
from fp8kv.runtime.server.service import Service


class CompletionForm(Form):
    """A request to continue prompts.

    With ``echo`` an answer begins with its prompt, and ``logprobs`` scores that, too; ``max_tokens`` may then be 0.
    """

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        super().__init__(service, body)
        self.num_prompts = len(body.prompt)
        self._request = body
        self._max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        self._prompts: tuple[tuple[int, ...], ...] = ()
        self._texts: list[str] = []
        self._offsets: defaultdict[int, TextOffsets] = defaultdict(
            lambda: TextOffsets(service.llm.tokenizer)
        )

    def check(self) -> None:
        """Refuse what can be refused before anything is done."""
        # 0 tokens are an answer where there is something else in it
        least = 1 if self._request.echo and self._max_tokens == 0 else self._max_tokens
        self._request.sampling(least, self._request.logprobs)
        if self._request.stream and self._max_tokens == 0:
            raise refuse("max_tokens is 0: there is nothing to stream", "max_tokens")

    async def read_work(self) -> Work:
        """Tokenise the texts."""
        self._prompts, self._texts = await self.service.tokenize(self._encode)
        body = self._request
        parameters = body.sampling(self._max_tokens, body.logprobs) if self._max_tokens else None
        return Work(self._prompts, parameters, body.logprobs if body.echo else None)

    def whole_choice(self, prompt: int, choice: Choice) -> dict[str, Any]:
        """Return text and logprobs, those of the prompt first."""
        offsets = TextOffsets(self.service.llm.tokenizer)
        logprobs = None
        if self._request.logprobs is not None:
            entries = (*self.session.scores.get(prompt, ()), *choice.logprobs)
            first = self._prompts[prompt][0] if self._request.echo else None
            logprobs = completion_logprobs(entries, self.service.names, offsets, first)
        echo = self._texts[prompt] if self._request.echo else ""
        return {"text": echo + choice.text, "logprobs": logprobs}

    def first_parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the prompts where they are wanted."""
        if not self._request.echo:
            return
        for number in range(self.session.num_sequences):
            prompt = number // self._request.num_choices
            logprobs = None
            if self._request.logprobs is not None:
                logprobs = completion_logprobs(
                    self.session.scores[prompt],
                    self.service.names,
                    self._offsets[number],
                    self._prompts[prompt][0],
                )
            yield number, {"text": self._texts[prompt], "logprobs": logprobs}

    def part(self, prompt: int, choice: int, output: Output) -> dict[str, Any]:
        """Return text and logprobs."""
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = completion_logprobs(
                output.logprobs, self.service.names, self._offsets[choice]
            )
        return {"text": output.text, "logprobs": logprobs}

    def _encode(self) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
        """Return tokens and, where they are echoed, texts; run where the tokenizer is used."""
        llm = self.service.llm
        prompts = tuple(llm.encode(prompt) for prompt in self._request.prompt)
        texts = []
        if self._request.echo:
            for given, token_ids in zip(self._request.prompt, prompts, strict=True):
                texts.append(given if isinstance(given, str) else self._decode(token_ids))
        return prompts, texts

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        known = [one for one in token_ids if 0 <= one < self.service.llm.limits.vocab_size]
        text: str = self.service.llm.tokenizer.decode(
            known, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
