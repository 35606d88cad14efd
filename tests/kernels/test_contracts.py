"""What all kernels have in common: a launcher and a reference that take the same, tests, a benchmark, a line in the docs."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels"
# timed as a part of the decode kernels
NOT_TIMED_ALONE = {"combine"}
# how a kernel is launched, which a reference has no use for
LAUNCH_ONLY = {"pdl", "num_splits"}


def launchers():
    """Return the modules that hold a launcher: a function of the module's own name."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        functions = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)
        ]
        if path.stem in functions:
            found.append(path.stem)
    return found


def test_the_eight_kernels_are_there():
    expected = {
        "quantize",
        "cache_write",
        "mla_pack",
        "rope_quantize",
        "gather",
        "decode_gqa",
        "decode_mla",
        "extend",
    }
    assert expected <= set(launchers())


def functions(name):
    module = importlib.import_module(f"fp8kv.kernels.{name}")
    return getattr(module, name), getattr(module, f"reference_{name}")


def parameters(function):
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in LAUNCH_ONLY
    ]


@pytest.mark.parametrize("name", launchers())
def test_a_reference_takes_what_its_launcher_takes(name):
    launcher, reference = functions(name)
    assert parameters(reference) == parameters(launcher)


@pytest.mark.parametrize("name", launchers())
def test_a_launcher_says_what_it_takes_and_what_it_refuses(name):
    launcher, reference = functions(name)
    for function in (launcher, reference):
        annotated = {
            key: value.annotation for key, value in inspect.signature(function).parameters.items()
        }
        assert inspect.Parameter.empty not in annotated.values()
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    text = inspect.getdoc(launcher)
    assert "Args:" in text
    assert "KernelArgumentError" in text
    missing = [key for key in inspect.signature(launcher).parameters if f"{key}" not in text]
    assert missing == []


@pytest.mark.parametrize("name", launchers())
def test_a_kernel_has_tests_a_benchmark_and_a_line_in_the_documentation(name):
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").exists()
    if name not in NOT_TIMED_ALONE:
        assert (ROOT / "benchmarks" / "kernels" / f"{name}.py").exists()
        page = (ROOT / "docs" / "kernels.md").read_text()
        assert f"| `{name}`" in page
        assert f"<!-- {name}: made by table.py -->" in page


def test_what_is_timed_is_what_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    timed = importlib.import_module("benchmarks.kernels.workers").KERNELS
    assert sorted(timed) == sorted(set(launchers()) - NOT_TIMED_ALONE)
