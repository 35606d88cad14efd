"""Checkpoint in, scales out, checkpoint written.

The public names are imported on first use, so that what needs no torch does not pay for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8kv.calibrate.derive import derive_scales as derive_scales
    from fp8kv.calibrate.formats.checkpoint import Checkpoint as Checkpoint
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint as open_checkpoint
    from fp8kv.calibrate.formats.facts import ModelFacts as ModelFacts
    from fp8kv.calibrate.formats.facts import model_facts as model_facts
    from fp8kv.calibrate.overlay.strip import strip as strip
    from fp8kv.calibrate.pipeline import CalibrationResult as CalibrationResult
    from fp8kv.calibrate.pipeline import calibrate as calibrate
    from fp8kv.calibrate.scales import LayerScales as LayerScales
    from fp8kv.calibrate.scales import ScaleSet as ScaleSet
    from fp8kv.calibrate.statistics import KVStatistics as KVStatistics
    from fp8kv.calibrate.stats_file import load_statistics as load_statistics
    from fp8kv.calibrate.stats_file import save_statistics as save_statistics
    from fp8kv.calibrate.validation.inspection import inspect as inspect
    from fp8kv.calibrate.validation.validate import validate as validate
    from fp8kv.calibrate.verdicts import convergence as convergence
    from fp8kv.calibrate.verdicts import judge as judge

_HOMES = {
    "CalibrationResult": "pipeline",
    "Checkpoint": "formats.checkpoint",
    "KVStatistics": "statistics",
    "LayerScales": "scales",
    "ModelFacts": "formats.facts",
    "ScaleSet": "scales",
    "calibrate": "pipeline",
    "convergence": "verdicts",
    "derive_scales": "derive",
    "inspect": "validation.inspection",
    "judge": "verdicts",
    "load_statistics": "stats_file",
    "model_facts": "formats.facts",
    "open_checkpoint": "formats.checkpoint",
    "save_statistics": "stats_file",
    "strip": "overlay.strip",
    "validate": "validation.validate",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
