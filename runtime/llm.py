"""A checkpoint, ready to generate: the model, its paged cache, its tokenizer and the engine in one object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.cache_counters import LayerCounts
from fp8kv.runtime.engine import Engine, Runner
from fp8kv.runtime.generation import eos_token_ids, max_positions
from fp8kv.runtime.limits import MAX_BATCH_TOKENS, MAX_SEQUENCES, EngineLimits
from fp8kv.runtime.loading import LoadedModel, load, load_once
from fp8kv.runtime.model_runner import Prefill
from fp8kv.runtime.packed_logits import rows_at_once
from fp8kv.runtime.paged_cache import CacheMode
from fp8kv.runtime.requests import Completion, Output, Request, join_outputs, read_token_ids
from fp8kv.runtime.runner_builder import (
    PAGE_SIZE,
    BuiltRunner,
    RunnerOptions,
    build_runner,
)
from fp8kv.runtime.sampling import SamplingParameters
from fp8kv.runtime.scoring import Scorer, TokenScore
from fp8kv.runtime.streams import Streams

__all__ = ["LLM", "LoadedModel", "Prompt", "load"]

Prompt = str | Sequence[int]
"""A text, or the token ids of one."""


class LLM:
    """Generates with a checkpoint of Hugging Face's format, its KV cache held as asked.

    Use as a context manager, or call :meth:`close`. Not safe for threads. Of all LLMs over one :class:`LoadedModel`
    only one may be open at a time.

    Attributes:
        engine: for requests that come and go one by one; who steps it himself calls none of the methods below
            meanwhile, which would take his outputs.
        tokenizer: of transformers.
        device: where the model runs.
        limits: what the engine accepts and does at once.
        backend: the name of the attention backend.
        max_positions: tokens that the model takes; None where it names no limit.
        max_length: tokens that a prompt and its continuation may have together, by the model and by the cache.
    """

    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        cache: CacheMode = "fp8",
        backend: str | None = None,
        prefill: Prefill = "fp8",
        cuda_graphs: bool = True,
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
        memory_fraction: float | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        count_clipped: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the weights, unless they are loaded, and take the memory of the cache.

        Args:
            source: a directory, a hub id, or what :func:`load` returned.
            cache: ``fp8`` with the checkpoint's scales, ``fp8-unit``, ``bf16``, ``emulate`` or ``float32``.
            backend: ``reference`` or ``triton``; None takes the fastest that runs on the device.
            prefill: what a prompt's own tokens are attended as: the ``fp8`` codes that later steps read, or the
                ``bf16`` numbers before quantisation.
            cuda_graphs: replay decode steps from CUDA graphs, on a GPU.
            page_size: tokens of a cache page, a power of two.
            num_pages: of the cache; None takes what the memory gives.
            memory_fraction: of a GPU's memory that weights, cache and the largest step may take together, 0.9 by
                default; the rest is for graphs and for scoring. On a CPU the cache takes 1 GiB at most.
            max_batch_tokens: tokens of a forward pass; longer prompts are computed in chunks.
            max_sequences: continuations that are generated at one time.
            count_clipped: count what the cache clips and flushes, for :meth:`cache_counts`.
            dtype: for :func:`load`, as are the next three; refused where the model is loaded already.
            device: for :func:`load`.
            revision: for :func:`load`.
            trust_remote_code: for :func:`load`.

        Raises:
            Fp8kvError: a subclass that says what is wrong with the checkpoint, the model or the settings.
        """
        options = RunnerOptions(
            cache=cache,
            backend=backend,
            prefill=prefill,
            cuda_graphs=cuda_graphs,
            page_size=page_size,
            num_pages=num_pages,
            memory_fraction=memory_fraction,
            count_clipped=count_clipped,
        )
        loaded = load_once(
            source,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.limits = EngineLimits(
            vocab_size=loaded.vocab_size,
            max_positions=max_positions(loaded.model),
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
        )
        ends = eos_token_ids(loaded.model, self.tokenizer)
        # from here on the model is held, and nothing raises
        built = build_runner(loaded, self.limits, options)
        self._built: BuiltRunner | None = built
        self.backend = built.backend
        self.max_positions = self.limits.max_positions
        self.max_length = min(built.capacity, self.max_positions or built.capacity)
        self.engine = Engine(
            built.steps,
            built.allocator,
            self.tokenizer,
            self.limits,
            eos_token_ids=ends,
            device=self.device,
        )
        self._streams = Streams(self.engine)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def runner(self) -> Runner:
        """What computes the engine's steps."""
        return self._open.steps

    def close(self) -> None:
        """Drop all requests, give the model back as it was found and free the cache; no more is generated."""
        self.engine.close()
        if self._built is None:
            return
        if self.device.type == "cuda":
            # a pass may still run
            torch.cuda.synchronize(self.device)
        self._built.held.close()
        self._built = None
        if self.device.type == "cuda":
            # torch would keep the memory for itself
            torch.cuda.empty_cache()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt, with the special tokens that the tokenizer puts around a text."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the token ids of every prompt.

        Raises:
            RequestError: the prompts are one text, or one of them is neither text nor token ids.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is one text: give a list of them")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        # in one call, which fast tokenizers spread over the cores
        encoded = iter(self.tokenizer(texts)["input_ids"] if texts else ())
        return [read_token_ids(next(encoded) if isinstance(one, str) else one) for one in prompts]

    def generate(
        self,
        prompts: Sequence[Prompt],
        parameters: SamplingParameters | Sequence[SamplingParameters],
    ) -> list[Completion]:
        """Continue every prompt; return in the order of ``prompts``.

        Args:
            prompts: texts or token ids.
            parameters: one for all, or one for each prompt.

        Raises:
            RequestError: a prompt does not fit, or there are more or fewer parameters than prompts.
            EvaluationError: the model's logits hold NaN or infinity; the other prompts are cancelled.
        """
        found = dict(self.generate_iter(prompts, parameters))
        return [found[number] for number in range(len(found))]

    def generate_iter(
        self,
        prompts: Sequence[Prompt],
        parameters: SamplingParameters | Sequence[SamplingParameters],
    ) -> Iterator[tuple[int, Completion]]:
        """Continue every prompt; yield its number with what came of it as it is done.

        Arguments and errors are those of :meth:`generate`. Who stops listening cancels the rest.
        """
        encoded = self.encode_all(prompts)
        if isinstance(parameters, SamplingParameters):
            parameters = [parameters] * len(encoded)
        if len(parameters) != len(encoded):
            raise RequestError(
                f"{len(encoded)} prompts have {len(parameters)} parameters: give one for each, or one for all"
            )
        requests = [Request(*pair) for pair in zip(encoded, parameters, strict=True)]
        steps: list[list[list[Output]]] = [
            [[] for _ in range(request.parameters.n)] for request in requests
        ]
        unfinished = [request.parameters.n for request in requests]
        for number, output in self._streams.run(requests):
            steps[number][output.index].append(output)
            unfinished[number] -= output.finish_reason is not None
            if not unfinished[number]:
                choices = tuple(join_outputs(one) for one in steps[number])
                yield number, Completion(requests[number].prompt_token_ids, choices)

    def stream(self, prompt: Prompt, parameters: SamplingParameters) -> Iterator[Output]:
        """Continue one prompt and yield every token as it comes; who stops listening cancels it.

        Raises:
            RequestError: the prompt does not fit.
            EvaluationError: the model's logits hold NaN or infinity.
        """
        for _, output in self._streams.run([Request(self.encode(prompt), parameters)]):
            yield output

    def logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return for every prompt the natural log-probability of each token but the first, given those before it.

        Raises:
            RequestError: a prompt is empty or does not fit.
            EvaluationError: the model's logits hold NaN or infinity.
        """
        return [[score.logprob for score in scores] for scores in self.score(prompts)]

    def score(self, prompts: Sequence[Prompt]) -> list[list[TokenScore]]:
        """Return for every prompt what the model says of each token but the first, given those before it.

        Raises:
            RequestError: a prompt is empty or does not fit.
            EvaluationError: the model's logits hold NaN or infinity.
        """
        return self._scorer.score(self.encode_all(prompts))

    def teacher_forced(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits that predict the tokens of each answer behind its prompt, in order.

        Answers of up to 1024 tokens come whole, longer ones in pieces of a number of rows that depends on the
        vocabulary only. Many sequences share a forward pass, and few logits are held at one time.

        Args:
            sequences: the token ids of prompt and answer, at least one of each.

        Yields:
            The number of a sequence and ``[answer tokens, vocabulary]``, float32, on the device.

        Raises:
            RequestError: a sequence is too long, or lacks a prompt or an answer.
        """
        return self._scorer.teacher_forced(sequences)

    def cache_counts(self) -> Mapping[str, LayerCounts]:
        """Return by layer how many values the cache clipped and flushed since it was made.

        Raises:
            RequestError: they were not counted.
        """
        counters = self._open.counters
        if counters is None:
            raise RequestError("nothing was counted: make the LLM with count_clipped=True")
        return counters.counts()

    @property
    def _open(self) -> BuiltRunner:
        if self._built is None:
            raise RequestError("the LLM is closed: make a new one")
        return self._built

    @property
    def _scorer(self) -> Scorer:
        return Scorer(
            self._open.model,
            self._open.allocator,
            self.limits,
            rows_at_once(self.limits.vocab_size),
            self.device,
        )
