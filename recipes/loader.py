"""Recipes by name or file, as YAML, as a digest, and by the checkpoint that they fit."""

import hashlib
import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

import yaml

from .build import build_expect, build_recipe, did_you_mean, recipe_content
from .errors import RecipeError
from .matching import model_disagreements
from .schema import Expect, Recipe

_SUFFIXES = (".yaml", ".yml")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a built-in recipe by its name, or any recipe by its file.

    Args:
        name_or_path: A name of :func:`list_recipes`, which wins over a file of that name, or a path.

    Raises:
        RecipeError: No such recipe or file, or its content is no valid recipe; the message names the recipe or
            file, the line for YAML errors, and the key for all others.
    """
    origin, text = _read(name_or_path)
    try:
        return build_recipe(_parse(text))
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from None


def load_expect(*settings: str) -> Expect:
    """Load expectations; a later setting wins over those before it.

    Args:
        settings: Each ``key=value`` (``max_kl=1e-3``), or the name or file of a recipe, or a YAML or JSON file that
            holds an ``expect`` section's keys alone.

    Raises:
        RecipeError: A setting cannot be read, has an unknown key or a wrong value, or all together say nothing.
    """
    chosen: dict[str, object] = {}
    for setting in settings:
        key, is_inline, value = setting.partition("=")
        found = {key: _number(value)} if is_inline else _thresholds(setting)
        chosen |= {name: each for name, each in found.items() if each is not None}
    expect = build_expect(chosen)
    if expect == Expect(arm=expect.arm):
        raise RecipeError(
            f"{' '.join(settings) or 'no setting'} expects nothing; give thresholds such as max_accuracy_drop=1"
        )
    return expect


def recipe_text(name_or_path: str | Path) -> str:
    """Give a recipe's YAML as it was written, comments included.

    Raises:
        RecipeError: No such recipe or file.
    """
    return _read(name_or_path)[1]


def default_recipe() -> Recipe:
    """Give the recipe of a checkpoint that has none: the schema's defaults, for any model."""
    return Recipe(name="default", description="The defaults, for any model")


def list_recipes() -> list[str]:
    """List the names of the built-in recipes in alphabetical order."""
    library = resources.files(__package__) / "library"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in library.iterdir()
        if entry.name.endswith(".yaml")
    )


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML, every default spelled out, in a fixed order; loading it gives the same recipe."""
    # ASCII alone: PyYAML reads back some unescaped characters (U+0085) as line breaks.
    return yaml.safe_dump(recipe_content(recipe), sort_keys=False, allow_unicode=False, width=100)


def recipe_digest(recipe: Recipe) -> str:
    """Give the SHA-256, in hex, of all that a recipe says about the calibration, defaults included.

    The order of keys and the way of writing (comments, spaces, ``1`` for ``1.0``) do not matter, nor does what is
    expected of the result, which shapes nothing of it.
    """
    content = {key: value for key, value in recipe_content(recipe).items() if key != "expect"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def find_recipe_for(config: Mapping[str, Any], source: str | None = None) -> str | None:
    """Find the built-in recipe that fits a checkpoint.

    Args:
        config: The checkpoint's ``config.json``.
        source: The hub id or directory that the user named. Sister models share all facts (DeepSeek-V3 and R1,
            the MiniMax-M2 line); a source whose last part is that of one of the recipe's hub ids decides.

    Returns:
        The recipe's name, or None if no recipe accepts the ``model_type`` and all facts. Among several the
        named one goes first, then one for the outer ``model_type``, then the first of the alphabet.
    """
    wanted = PurePath(source).name.casefold() if source else None
    ranked = []
    for name in list_recipes():
        model = load_recipe(name).model
        if not model.model_type or model_disagreements(model, config):
            continue
        named = wanted in {PurePath(hub_id).name.casefold() for hub_id in model.ids}
        outer = config.get("model_type") in model.model_type
        ranked.append((not named, not outer, name))
    return min(ranked)[-1] if ranked else None


def _read(name_or_path: str | Path) -> tuple[str, str]:
    """Give what to call the recipe in messages, and its text."""
    name = str(name_or_path)
    known = list_recipes()
    if isinstance(name_or_path, str) and name in known:
        entry = resources.files(__package__) / "library" / f"{name}.yaml"
        return f"recipe {name}", entry.read_text(encoding="utf-8")
    path = Path(name_or_path)
    looks_like_path = not isinstance(name_or_path, str) or len(path.parts) > 1
    if not looks_like_path and not name.endswith(_SUFFIXES) and not os.path.isfile(path):
        raise RecipeError(
            f"unknown recipe {name}{did_you_mean(name, known)}; built-in recipes: {', '.join(known)}; "
            "or give the path of a YAML file"
        )
    try:
        return name, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"recipe file {name} does not exist; check the path, or use a built-in recipe: {', '.join(known)}"
        ) from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe file {name} is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe file {name} cannot be read: {error}") from None


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _thresholds(name_or_path: str) -> Mapping[str, object]:
    origin, text = _read(name_or_path)
    try:
        content = _parse(text)
        if isinstance(content, Mapping) and "schema" not in content:
            build_expect(content)
            return content
        return asdict(build_recipe(content).expect)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from None


def _parse(text: str) -> object:
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{line}{problem}; correct the YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"this is no YAML that can be read: {reason}") from None
    if content is None:
        raise RecipeError("the recipe is empty; start with the lines `schema: 1` and `name: ...`")
    return content


class _StrictLoader(yaml.SafeLoader):
    """The safe loader without what makes a small file surprising: repeated keys, aliases, and dates as objects."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML reads a class attribute of this type
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read in recipes, write the value out",
                problem_mark=mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} stands twice in one mapping, keep one",
                    problem_mark=key.start_mark,
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)
