"""``fp8kv recipes``."""

from __future__ import annotations

import sys

import click

from fp8kv.options import output_options
from fp8kv.output import Output


@click.group("recipes")
def recipes_group() -> None:
    """List, show and check recipes."""


@recipes_group.command("list")
@output_options
def list_command(as_json: bool, quiet: bool) -> None:
    """List the built-in recipes; into a pipe, their names alone."""
    from fp8kv.recipes import list_recipes, load_recipe

    quiet = quiet or not sys.stdout.isatty()
    output = Output(as_json=as_json, quiet=quiet)
    recipes = [load_recipe(name) for name in list_recipes()]
    output.table(
        "recipes",
        ("name", "attention", "for"),
        [[r.name, r.model.attention or "any", r.description] for r in recipes],
    )
    if quiet:
        for recipe in recipes:
            output.data(recipe.name)
    output.json(
        [
            {
                "name": recipe.name,
                "attention": recipe.model.attention,
                "description": recipe.description,
                "models": list(recipe.model.ids),
            }
            for recipe in recipes
        ]
    )


@recipes_group.command("show")
@click.argument("recipe")
@click.option("--json", "as_json", is_flag=True, help="As JSON, every default spelled out.")
def show_command(recipe: str, as_json: bool) -> None:
    """Print RECIPE, a built-in name or a file, as it is written."""
    from fp8kv.recipes import load_recipe, recipe_content, recipe_text

    content = recipe_content(load_recipe(recipe))
    if as_json:
        Output(as_json=True).json(content)
    else:
        click.echo(recipe_text(recipe), nl=False)


@recipes_group.command("check")
@click.argument("recipe")
@click.option("--model", help="Also check its model facts against this checkpoint.")
@click.option("--revision", help="Revision of a hub id.")
@output_options
def check_command(
    recipe: str, model: str | None, revision: str | None, as_json: bool, quiet: bool
) -> None:
    """Check RECIPE, a built-in name or a file, against the schema."""
    from fp8kv.recipes import check_model, load_recipe, recipe_digest

    output = Output(as_json=as_json, quiet=quiet)
    loaded = load_recipe(recipe)
    if model is not None:
        from fp8kv.calibrate.formats.checkpoint import open_checkpoint

        check_model(loaded, open_checkpoint(model, revision).config)
    digest = recipe_digest(loaded)
    if not quiet:
        output.data(f"{loaded.name}: ok, sha256 {digest}")
    output.json({"name": loaded.name, "model": model, "sha256": digest})
