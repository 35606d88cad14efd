"""``fp8kv recipes``."""

import json

import pytest

from fp8kv.recipes import (
    build_recipe,
    list_recipes,
    load_recipe,
    recipe_content,
    recipe_digest,
    recipe_text,
)


def test_list_gives_names_alone_into_a_pipe(run):
    result = run("recipes", "list")

    assert (result.exit_code, result.stdout.splitlines(), result.stderr) == (0, list_recipes(), "")


def test_list_draws_a_table_on_a_terminal(run, monkeypatch):
    monkeypatch.setattr("fp8kv.commands.recipes.sys", _TerminalOutput())

    result = run("recipes", "list")

    assert result.stdout == ""
    names = [line.split()[0] for line in result.stderr.splitlines()[3:] if line[:1].strip()]
    assert names == list_recipes()


def test_list_as_json(run):
    data = json.loads(run("recipes", "list", "--json").stdout)

    assert [entry["name"] for entry in data] == list_recipes()
    assert data[list_recipes().index("minimax-m2")]["models"] == ["MiniMaxAI/MiniMax-M2"]


def test_show_prints_the_file_as_it_is(run):
    assert run("recipes", "show", "kimi-k2.5").stdout == recipe_text("kimi-k2.5")


def test_show_as_json_spells_every_default_out(run):
    data = json.loads(run("recipes", "show", "llama-3", "--json").stdout)

    assert data == json.loads(json.dumps(recipe_content(load_recipe("llama-3"))))
    assert build_recipe(data) == load_recipe("llama-3")


def test_check_prints_name_and_digest(run, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schema: 1\nname: mine\n")

    result = run("recipes", "check", recipe)

    assert result.exit_code == 0
    assert result.stdout == f"mine: ok, sha256 {recipe_digest(load_recipe(recipe))}\n"


def test_check_as_json_and_quiet(run):
    data = json.loads(run("recipes", "check", "qwen3", "--json").stdout)

    assert data == {"name": "qwen3", "model": None, "sha256": recipe_digest(load_recipe("qwen3"))}
    quiet = run("recipes", "check", "qwen3", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_check_against_a_model_lists_what_differs(run, minimax_source):
    result = run("recipes", "check", "minimax-m2", "--model", minimax_source)

    assert result.exit_code == 3
    assert "num_hidden_layers is 6, expected 62" in result.stderr
    assert "head_dim" not in result.stderr


def test_check_against_a_model_that_fits(run, minimax_source, tmp_path):
    recipe = tmp_path / "mine.yaml"
    facts = "{model_type: [minimax_m2], attention: gqa, facts: {num_hidden_layers: 6}}"
    recipe.write_text(f"schema: 1\nname: mine\nmodel: {facts}\n")

    assert run("recipes", "check", recipe, "--model", minimax_source).exit_code == 0


@pytest.mark.parametrize("command", ["show", "check"])
def test_an_unknown_name_gets_a_suggestion(run, command):
    result = run("recipes", command, "minimax-m3")

    assert result.exit_code == 3
    assert "unknown recipe minimax-m3 (did you mean minimax-m2" in result.stderr


class _TerminalOutput:
    """Stands in for the module ``sys`` of the command."""

    class stdout:
        @staticmethod
        def isatty():
            return True
