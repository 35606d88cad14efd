"""A checkpoint in memory."""

from dataclasses import replace

import pytest
import torch

from fp8kv.demo import MODELS
from fp8kv.recipes.errors import Fp8kvError, RequestError
from fp8kv.runtime.loading import LoadedModel, load, load_once

SETTINGS = {"dtype": "auto", "device": "auto", "revision": None, "trust_remote_code": False}


@pytest.fixture(scope="module")
def loaded():
    return load(MODELS["tiny-minimax-m2"], device="cpu", dtype="bfloat16")


def test_what_belongs_to_a_model_comes_with_it(loaded):
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert loaded.vocab_size == loaded.model.get_input_embeddings().num_embeddings
    assert loaded.checkpoint is not None
    assert loaded.tokenizer("a")["input_ids"]
    assert replace(loaded, scales=None).model is loaded.model


def test_what_is_loaded_is_not_loaded_again(loaded):
    assert load_once(loaded, **SETTINGS) is loaded
    assert isinstance(
        load_once(MODELS["tiny-minimax-m2"], **SETTINGS | {"device": "cpu"}), LoadedModel
    )


@pytest.mark.parametrize(
    "setting",
    [{"dtype": "float32"}, {"device": "cpu"}, {"revision": "main"}, {"trust_remote_code": True}],
)
def test_settings_of_loading_come_too_late_for_what_is_loaded(loaded, setting):
    with pytest.raises(RequestError, match="loaded already"):
        load_once(loaded, **SETTINGS | setting)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"dtype is 'int3': give one of auto, bfloat16"):
        load(tmp_path, dtype="int3")
    with pytest.raises(Fp8kvError):
        load(tmp_path, device="cpu")
