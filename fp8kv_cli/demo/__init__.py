"""What ``fp8kv demo`` runs on: two small trained models and problems in GSM8K's format, as package data."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# package data of an unpacked distribution: a real directory
_ROOT = Path(str(files(__name__)))

MODELS: dict[str, Path] = {
    "tiny-minimax-m2": _ROOT / "models" / "tiny-minimax-m2",
    "tiny-deepseek-v3": _ROOT / "models" / "tiny-deepseek-v3",
}
TRAIN_DATA = _ROOT / "data" / "gsm-synth-train.jsonl"
TEST_DATA = _ROOT / "data" / "gsm-synth-test.jsonl"

BUILTIN_DATASETS: dict[str, Path] = {"builtin:gsm-synth": TRAIN_DATA}
"""Names that a recipe or ``--dataset`` may use without a network."""
