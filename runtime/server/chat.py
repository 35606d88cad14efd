"""``/v1/chat/completions``: messages, made a prompt of by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.requests import Choice, Output
from fp8kv.runtime.server.api_errors import refuse
from fp8kv.runtime.server.forms import Form
from fp8kv.runtime.server.jobs import Work
from fp8kv.runtime.server.logprobs import chat_logprobs
from fp8kv.runtime.server.protocol import ChatRequest
from fp8kv.runtime.server.service import Service


class ChatForm(Form):
    """A request to answer in a chat. Without ``max_tokens`` an answer may fill the model's positions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatRequest) -> None:
        super().__init__(service, body)
        self._request = body

    def check(self) -> None:
        """Refuse what can be refused before anything is done."""
        if not getattr(self.service.llm.tokenizer, "chat_template", None):
            raise refuse("the model has no chat template: use /v1/completions", "messages")
        asked = self._request.asked_tokens()
        self._request.sampling(1 if asked is None else asked, self._request.asked_logprobs())

    async def read_work(self) -> Work:
        """Apply the template and tokenise."""
        prompt = await self.service.tokenize(self._encode)
        asked = self._request.asked_tokens()
        max_tokens = self._room(len(prompt)) if asked is None else asked
        return Work((prompt,), self._request.sampling(max_tokens, self._request.asked_logprobs()))

    def whole_choice(self, prompt: int, choice: Choice) -> dict[str, Any]:
        """Return message and logprobs."""
        return {
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice),
        }

    def first_parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the role of every choice."""
        for number in range(self.session.num_sequences):
            yield number, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, prompt: int, choice: int, output: Output) -> dict[str, Any]:
        """Return text and logprobs."""
        delta = {"content": output.text} if output.text else {}
        return {"delta": delta, "logprobs": self._logprobs(output)}

    def _logprobs(self, source: Choice | Output) -> dict[str, Any] | None:
        return (
            chat_logprobs(source.logprobs, self.service.names) if self._request.logprobs else None
        )

    def _encode(self) -> tuple[int, ...]:
        """Run where the tokenizer is used."""
        tokenizer = self.service.llm.tokenizer
        messages = [message.to_template() for message in self._request.messages]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}") from None
        # the template writes the special tokens itself
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _room(self, num_tokens: int) -> int:
        """Return the most tokens that can follow so many; at least 1, which the engine then refuses with the reason."""
        return max(self.service.llm.max_length - num_tokens, 1)
