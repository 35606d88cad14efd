"""What the runtime's tests share: a fake model and a tokenizer for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fake_model() -> ModuleType:
    """The module ``fake_model``; under importlib mode there is no package to import it from."""
    spec = importlib.util.spec_from_file_location(
        "fp8kv_tests_fake_model", Path(__file__).with_name("fake_model.py")
    )
    if spec is None or spec.loader is None:
        raise ImportError("fake_model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_models: ModuleType) -> Any:
    """A tokenizer whose first 256 ids are bytes and the next three special tokens."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.save_byte_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def greedy_texts() -> Callable[..., list[str]]:
    """Give transformers' own greedy continuations, prompt by prompt, cut after the token that completes a stop string.

    What the engine says is compared with it: ``greedy_texts(model, tokenizer, prompts, count, stops)``.
    """

    def get(
        model: Any, tokenizer: Any, prompts: Sequence[str], count: int, stops: Sequence[str] = ()
    ) -> list[str]:
        import torch
        from transformers import GenerationConfig

        ends = model.generation_config.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            stop_strings=list(stops) or None,
        )
        texts = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.inference_mode():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    tokenizer=tokenizer,
                )
            texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        return texts

    return get
