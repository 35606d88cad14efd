"""Recipes: what to calibrate, on what data, how, for which engines, and what was measured.

A recipe is YAML on disk and a frozen dataclass in memory. ``load_recipe("minimax-m2")`` gives a built-in one,
``load_recipe("my.yaml")`` one's own; ``override`` lays the command line over it, ``check_model`` refuses a
checkpoint that it was not written for. This room needs no torch and imports nothing else of fp8kv.
"""

from .build import build_recipe, override, recipe_content
from .errors import (
    CalibrationError,
    CheckpointError,
    DataError,
    EvaluationError,
    Fp8kvError,
    OutputError,
    RecipeError,
    ScaleError,
    StatisticsError,
    UnsupportedModelError,
)
from .loader import (
    default_recipe,
    find_recipe_for,
    list_recipes,
    load_expect,
    load_recipe,
    recipe_digest,
    recipe_text,
    recipe_to_yaml,
)
from .matching import check_model
from .schema import (
    SCHEMA_VERSION,
    Calibration,
    Data,
    Expect,
    Model,
    Output,
    Recipe,
    Scales,
    Serve,
    Source,
)

__all__ = [
    "SCHEMA_VERSION",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Data",
    "DataError",
    "EvaluationError",
    "Expect",
    "Fp8kvError",
    "Model",
    "Output",
    "OutputError",
    "Recipe",
    "RecipeError",
    "ScaleError",
    "Scales",
    "Serve",
    "Source",
    "StatisticsError",
    "UnsupportedModelError",
    "build_recipe",
    "check_model",
    "default_recipe",
    "find_recipe_for",
    "list_recipes",
    "load_expect",
    "load_recipe",
    "override",
    "recipe_content",
    "recipe_digest",
    "recipe_text",
    "recipe_to_yaml",
]
