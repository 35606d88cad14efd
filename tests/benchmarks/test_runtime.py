"""The floors of the runtime's benchmark, which need no GPU to be computed."""

import importlib
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch):
    """Give a module of the benchmark by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.runtime.{name}")


def test_floors_of_the_batch_are_operations_and_bytes(module):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(module("shapes").CONFIGS["llama-3-8b"])
    floors = module("llama").floors
    ceilings = module("floors").Ceilings(copy_tbps=4.23, bf16_tflops=697.6)
    row = {"total_s": 14.3, "step_ms": 23.6}

    # 3.94 PFLOP of prompts, then 127 steps of 15.0 GB of weights and 34.9 GB of keys and values
    bf16 = floors(model, ceilings, "bf16", row)
    assert bf16["floor_step_ms"] == pytest.approx(11.8, abs=0.05)
    assert bf16["floor_total_s"] == pytest.approx(5.65 + 127 * 0.0118, abs=0.03)
    assert bf16["total_over_floor"] == pytest.approx(2, abs=0.01)
    assert bf16["step_over_floor"] == pytest.approx(2, abs=0.01)

    # half the bytes of the cache, the same weights
    fp8 = floors(model, ceilings, "fp8", row)
    saved_ms = 64 * 4160 * 65_536 / 4.23e12 * 1e3
    assert bf16["floor_step_ms"] - fp8["floor_step_ms"] == pytest.approx(saved_ms, abs=0.01)


def test_every_id_of_the_tokenizer_has_a_text(module):
    tokenizer = module("shapes").build_tokenizer(50)
    assert tokenizer.decode([7, 49]) == "w7 w49"


def test_the_documentation_shows_what_the_committed_results_say(module):
    table = module("table")
    page = (ROOT / "docs" / "runtime.md").read_text()
    assert table.with_tables(page, table.newest_results()) == page
    assert page.count("made by table.py") == 2
