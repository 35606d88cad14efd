"""Whether a recipe was written for a checkpoint, by its ``config.json``."""

from collections.abc import Mapping
from typing import Any

from .errors import RecipeError
from .schema import Model, Recipe


def check_model(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a recipe was not written for.

    Args:
        recipe: The recipe to apply.
        config: The checkpoint's ``config.json``. Facts are looked up in its ``text_config`` first, where there
            is one, because that is the model that owns the KV cache.

    Raises:
        RecipeError: ``model_type`` or a fact disagrees; the message lists all that do.
    """
    wrong = model_disagreements(recipe.model, config)
    if wrong:
        raise RecipeError(
            f"recipe {recipe.name} does not fit this checkpoint: {'; '.join(wrong)}; choose another recipe, "
            "or correct its model section"
        )


def model_disagreements(model: Model, config: Mapping[str, Any]) -> list[str]:
    """List what a ``config.json`` says otherwise than a recipe, one phrase per key; empty if it fits."""
    nested = config.get("text_config")
    layers = (nested, config) if isinstance(nested, Mapping) else (config,)
    wrong = []
    types = [layer["model_type"] for layer in layers if "model_type" in layer]
    if model.model_type and not any(found in model.model_type for found in types):
        found_types = " / ".join(map(str, types)) or "missing"
        wrong.append(f"model_type is {found_types}, expected {' or '.join(model.model_type)}")
    for key, expected in model.facts.items():
        options = expected if isinstance(expected, list | tuple) else (expected,)
        holder = next((layer for layer in layers if key in layer), None)
        if holder is None:
            wrong.append(f"{key} is missing, expected {_alternatives(options)}")
        elif not any(_same(holder[key], option) for option in options):
            wrong.append(f"{key} is {holder[key]}, expected {_alternatives(options)}")
    return wrong


def _alternatives(options: list[Any] | tuple[Any, ...]) -> str:
    return " or ".join(map(str, options))


def _same(found: object, expected: object) -> bool:
    # True == 1 in Python, but a flag is not a count.
    return isinstance(found, bool) == isinstance(expected, bool) and found == expected
