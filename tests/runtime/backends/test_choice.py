"""The backend is chosen by name or by device, and what cannot run is refused."""

import importlib.util

import pytest

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.backends import choose_backend


@pytest.mark.parametrize("name", [None, "reference"])
def test_on_a_cpu_it_is_the_reference(name):
    assert choose_backend(name, "cpu").name == "reference"


def test_a_gpu_gets_the_kernels_unless_the_reference_is_asked_for():
    assert choose_backend(None, "cuda").name == "triton"
    assert choose_backend("triton", "cuda:1").name == "triton"
    assert choose_backend("reference", "cuda").name == "reference"


def test_an_unknown_name_is_refused():
    with pytest.raises(EvaluationError, match="unknown backend 'flash'; known backends: reference"):
        choose_backend("flash", "cpu")


def test_triton_on_a_cpu_is_refused():
    with pytest.raises(EvaluationError, match="but it would run on cpu; use backend 'reference'"):
        choose_backend("triton", "cpu")


def test_without_triton_a_gpu_gets_the_reference(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(None, "cuda").name == "reference"
    with pytest.raises(EvaluationError, match="Triton is not installed"):
        choose_backend("triton", "cuda")
