"""The engine as a model of lm-evaluation-harness: it answers the harness' three questions.

They are how likely a continuation is, how likely a whole text is, and what the model says. Tokenisation, truncation
from the left, windows and stops are those of the harness' own ``hf`` model, so the same checkpoint gives the same
numbers, up to rounding and to what the cache loses.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.answer_scores import MeasuredModel, score_answers
from fp8kv.runtime.sampling import SamplingParameters

DEFAULT_LENGTH = 2048
"""Tokens of a context where the model names no limit, as in the harness."""

MAX_NEW_TOKENS = 256
"""Of a generated text where the task names no limit, as in the harness."""


def harness_model(llm: MeasuredModel) -> Any:
    """Return ``llm`` as a model of the harness, an ``lm_eval.api.model.LM``.

    Raises:
        EvaluationError: the harness is not installed, or the tokenizer names no end of sequence.
    """
    harness = import_harness()
    if llm.tokenizer.eos_token_id is None:
        raise EvaluationError(
            "the tokenizer names no end of sequence (eos_token), which the harness stops at: add it to "
            "tokenizer_config.json"
        )
    # made here and not below, for its base comes with the harness
    adapter = type("Fp8kvModel", (_Adapter, harness.model.TemplateLM), {"__module__": __name__})()
    adapter.llm, adapter.tokenizer, adapter.harness = llm, llm.tokenizer, harness
    return adapter


def import_harness() -> SimpleNamespace:
    """Return the modules of the harness that are used here, and its version.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        modules = {
            name: importlib.import_module(f"lm_eval.{path}")
            for name, path in (
                ("evaluator", "evaluator"),
                ("model", "api.model"),
                ("model_utils", "models.utils"),
                ("task", "api.task"),
                ("tasks", "tasks"),
                ("utils", "utils"),
            )
        }
    except ImportError as error:
        raise EvaluationError(
            f'tasks need lm-evaluation-harness, and {error.name} is not installed: pip install "fp8kv[eval]"'
        ) from None
    return SimpleNamespace(version=importlib.metadata.version("lm_eval"), **modules)


class _Adapter:
    """The methods that the harness calls; they stand in front of its own class, which asks for most of them."""

    llm: MeasuredModel
    tokenizer: Any
    harness: Any
    cache_hook: Any

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        return DEFAULT_LENGTH if self.llm.max_positions is None else self.llm.max_positions

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: Any
    ) -> list[int]:
        first = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and string.startswith(first):
            # a chat template has put it there already
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's {self.max_length} positions: "
                    "the task is not for this model"
                )
            # the last token is predicted and never read, so it takes no position
            room = self.max_length + 1 - len(continuation)
            sequences.append((context[-room:], continuation))
        scores = dict(score_answers(self.llm, sequences))
        answers = [
            (scores[number].logprob, scores[number].is_greedy) for number in range(len(sequences))
        ]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cuts = self.harness.utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            own = [(None, *self.harness.utils.make_disjoint_window(cut)) for cut in cuts]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        sums = [sum(score for score, _ in itertools.islice(scores, count)) for count in counts]
        for request, one in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, parameters = [], []
        for number, (context, settings) in enumerate(request.args for request in requests):
            own = self._parameters(settings, seed=number)
            room = self.max_length - own.max_tokens
            if room < 1:
                raise EvaluationError(
                    f"the task asks for {own.max_tokens} new tokens, and the model has {self.max_length} positions "
                    "for them and the prompt: the task is not for this model"
                )
            prompts.append(self.tok_encode(context)[-room:])
            parameters.append(own)
        texts = [completion.text for completion in self.llm.generate(prompts, parameters)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _parameters(self, settings: Mapping[str, Any], seed: int) -> SamplingParameters:
        known = self.harness.model_utils.normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        end = self.tokenizer.decode([self.eot_token_id])
        stops = self.harness.model_utils.handle_stop_sequences(known.pop("until"), end)
        draws, temperature = known.pop("do_sample"), known.pop("temperature", 0.0)
        parameters = SamplingParameters(
            max_tokens=known.pop("max_gen_toks"),
            temperature=float(temperature) if draws else 0.0,
            top_k=known.pop("top_k", None) or None,
            top_p=float(known.pop("top_p", 1.0)),
            seed=seed,
            stop=tuple(stop for stop in stops if stop),
        )
        if known:
            raise EvaluationError(
                f"the task asks for {', '.join(sorted(known))} in generation, which the engine does not know: "
                "choose another task"
            )
        return parameters
