"""What the runtime's tests share: a fake model and a tokenizer for it."""

from __future__ import annotations

import importlib.util
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
