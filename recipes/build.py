"""Between plain mappings (what YAML and the command line hold) and recipes, strictly and both ways.

Values are converted by the field's type and never guessed: ``"512"`` is not a number, ``1`` is not a flag, and
an unknown key is an error. The one conversion is that a whole number serves where a number is expected.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError
from .schema import SCHEMA_VERSION, Expect, Recipe

_Section = TypeVar("_Section")
# Beyond it a float no longer holds every whole number.
_LARGEST_EXACT_INT = 2**53
_SCALARS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}


def build_recipe(content: object) -> Recipe:
    """Make a recipe of a plain mapping, as it stands in a YAML file.

    Args:
        content: A mapping with ``schema``, ``name`` and any sections. Where a list or a section is expected, a
            tuple or the section's dataclass is accepted too.

    Raises:
        RecipeError: An unknown or missing key, a value of the wrong type or out of range, or another schema.
            The message has the path of the key (``data.sources[1].weight``).
    """
    if not isinstance(content, Mapping):
        raise RecipeError(f"a recipe is a mapping of keys to values, found {_show(content)}")
    if "schema" not in content:
        raise RecipeError(f"schema is missing; add the line `schema: {SCHEMA_VERSION}`")
    version = content["schema"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise RecipeError(
            f"schema is {_show(version)}; this fp8kv reads schema {SCHEMA_VERSION}, "
            "so rewrite the recipe or use the fp8kv version that it was written for"
        )
    rest = {key: value for key, value in content.items() if key != "schema"}
    return _section(rest, Recipe, "")


def build_expect(content: object) -> Expect:
    """Make expectations of a plain mapping: a recipe's ``expect`` section on its own.

    Raises:
        RecipeError: As :func:`build_recipe`.
    """
    return _section(content, Expect, "expect")


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """Give a recipe as plain dictionaries, lists and scalars, every default spelled out, in a fixed order.

    ``build_recipe(recipe_content(recipe)) == recipe`` holds for every recipe.
    """
    return {"schema": SCHEMA_VERSION, **_plain_section(recipe)}


def override(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """Make a new recipe with some values replaced: the command line over the recipe over the defaults.

    Args:
        recipe: The recipe to start from; it stays as it is.
        changes: Key paths (``scales.estimator``, ``data.sources``) and new values. None means that the user
            gave none, and leaves the recipe's value.

    Raises:
        RecipeError: As :func:`build_recipe`.
    """
    content: object = recipe_content(recipe)
    for path, value in changes.items():
        if value is not None:
            content = _with(content, path.split("."), value)
    return build_recipe(content)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Give `` (did you mean X?)`` with a leading space for the known name closest to ``name``, or nothing."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" (did you mean {by_folded[close[0]]}?)" if close else ""


def _with(content: object, keys: list[str], value: object, path: str = "") -> object:
    """Copy nested mappings with one value replaced; what is not there yet is left for the build to refuse."""
    if not keys:
        return value
    if not isinstance(content, Mapping):
        raise RecipeError(f"{_join(path, keys[0])} is no key of a recipe: {path} is not a section")
    key, *rest = keys
    return {**content, key: _with(content.get(key, {}), rest, value, _join(path, key))}


def _section(value: object, section: type[_Section], path: str) -> _Section:
    if isinstance(value, section):
        return value
    if not isinstance(value, Mapping):
        raise _mismatch(path, value, "a mapping of keys to values")
    hints = get_type_hints(section)
    fields = {item.name: item for item in dataclasses.fields(section)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise RecipeError(_unknown_key(key, fields, path))
    for name, item in fields.items():
        required = (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        )
        if required and name not in value:
            raise RecipeError(f"{_join(path, name)} is missing; expected {_describe(hints[name])}")
    return section(
        **{key: _convert(item, hints[key], _join(path, key)) for key, item in value.items()}
    )


def _convert(value: object, expected: Any, path: str) -> Any:
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        # The schema's unions are all of one type with None.
        inner = next(option for option in args if option is not types.NoneType)
        return None if value is None else _convert(value, inner, path)
    if origin is Literal:
        if not isinstance(value, str):
            raise _mismatch(path, value, _describe(expected))
        if value not in args:
            raise _mismatch(path, value, _describe(expected) + did_you_mean(value, args))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _mismatch(path, value, _describe(expected))
        return tuple(_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _mismatch(path, value, _describe(expected))
        return _free(value, path)
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return _section(value, expected, path)
    return _scalar(value, expected, path)


def _scalar(value: object, expected: type, path: str) -> Any:
    # By exact type, because True is an int to isinstance.
    if type(value) is int and expected is float and abs(value) <= _LARGEST_EXACT_INT:
        return float(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is expected and finite:
        return value
    quotes = ", so put it in quotes" if expected is str and not isinstance(value, str) else ""
    raise _mismatch(path, value, _describe(expected) + quotes + _as_yaml(value, expected))


def _as_yaml(value: object, expected: type) -> str:
    """Say how to write a number that YAML 1.1 takes for text, such as ``1e-3``."""
    try:
        return f", so write {float(value)}" if expected is float and type(value) is str else ""
    except ValueError:
        return ""


def _free(value: object, path: str) -> Any:
    """Copy free-form content, which must be of the kinds that both YAML and JSON write."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{path} has the key {_show(key)}; expected text, so quote it")
        return {key: _free(item, _join(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_free(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise _mismatch(path, value, "text, a finite number, true, false or null")


def _plain_section(section: Any) -> dict[str, Any]:
    return {item.name: _plain(getattr(section, item.name)) for item in dataclasses.fields(section)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain_section(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _describe(expected: Any) -> str:
    origin = get_origin(expected)
    if origin is Literal:
        return f"one of {', '.join(get_args(expected))}"
    if origin is tuple:
        return "a list"
    return _SCALARS.get(expected, "a mapping of keys to values")


def _unknown_key(key: object, known: Iterable[str], path: str) -> str:
    if not isinstance(key, str):
        return f"{path or 'the recipe'} has the key {_show(key)}; expected text, so quote it"
    names = list(known)
    scope = f" of {path}" if path else ""
    return f"unknown key {_join(path, key)}{did_you_mean(key, names)}; known keys{scope}: {', '.join(names)}"


def _mismatch(path: str, value: object, expected: str) -> RecipeError:
    return RecipeError(f"{path} is {_show(value)}; expected {expected}")


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
