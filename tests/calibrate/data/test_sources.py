"""Sources: the command-line form, and telling files from hub names."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.calibrate.data.sources import Source, local_file, parse_source
from fp8kv.recipes.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.jsonl", Source("train.jsonl")),
        (
            "openai/gsm8k,config=main,split=test,weight=2,column=question",
            Source("openai/gsm8k", config="main", split="test", column="question", weight=2.0),
        ),
        ("/data/a:b@c=1.txt,weight=0.25", Source("/data/a:b@c=1.txt", weight=0.25)),
        ("notes, part 2.jsonl,column=body", Source("notes, part 2.jsonl", column="body")),
        (
            "x.csv,column=question, long,weight=3",
            Source("x.csv", column="question, long", weight=3),
        ),
        (" x.csv , column=y", Source("x.csv , column=y")),  # " column" is no word after the comma
    ],
)
def test_command_line_form(text, expected):
    assert parse_source(text) == expected


@given(
    dataset=st.from_regex(r"[a-z0-9./:@ -]*[a-z0-9]", fullmatch=True).map(str.strip),
    options=st.fixed_dictionaries(
        {},
        optional={
            "config": st.from_regex(r"[a-z0-9_.-]+", fullmatch=True),
            "split": st.from_regex(r"[a-z\[\]:0-9%]+", fullmatch=True),
            "column": st.from_regex(r"[A-Za-z_]+", fullmatch=True),
            "weight": st.floats(min_value=1e-3, max_value=1e3),
        },
    ),
)
def test_every_combination_of_options_survives_the_command_line(dataset, options):
    text = ",".join([dataset, *(f"{key}={value}" for key, value in options.items())])
    assert parse_source(text) == Source(dataset, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl,colum=x", "unknown option 'colum' (did you mean 'column'?)"),
        ("a.jsonl,weight=heavy", "weight is 'heavy'"),
        ("a.jsonl,weight=0", "weight is 0.0; it must be a positive number"),
        ("a.jsonl,weight=nan", "weight is nan"),
        ("a.jsonl,weight=-inf", "weight is -inf"),
        ("a.jsonl,split=a,split=b", "option split is given twice"),
        ("a.jsonl,column=", "column is empty"),
        ("", "dataset is empty"),
    ],
)
def test_broken_command_line_forms_name_the_culprit(text, message):
    with pytest.raises(DataError) as error:
        parse_source(text)
    assert message in str(error.value)


def test_a_source_refuses_an_infinite_weight():
    with pytest.raises(DataError, match="weight is inf"):
        Source("a.jsonl", weight=math.inf)


def test_an_existing_file_is_local_and_a_hub_name_is_not(tmp_path):
    path = tmp_path / "Train.JSONL"
    path.write_text("{}")
    assert local_file(Source(str(path))) == path
    assert local_file(Source("openai/gsm8k", config="main", split="test")) is None
    assert local_file(Source("wikitext")) is None


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("x")
    assert local_file(Source("~/x.txt")) == tmp_path / "x.txt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "dataset file missing.jsonl does not exist"),
        ("data/missing.parquet", "does not exist"),
        ("./data", "does not exist"),
        ("~nobody-here/data", "does not exist"),
        ("a/b/c", "neither a file nor a name on the Hugging Face hub"),
        ("builtin:nothing", "neither a file nor a name on the Hugging Face hub"),
        ("x.jsonl,main", "options are written ,KEY=VALUE"),
        ("x" * 5000 + "!", "neither a file nor a name"),
    ],
)
def test_names_that_are_nothing_are_refused_without_a_look_up(name, message):
    with pytest.raises(DataError) as error:
        local_file(Source(name))
    assert message in str(error.value)


def test_a_directory_is_refused_and_a_file_in_it_proposed(tmp_path):
    with pytest.raises(DataError, match="is a directory; name one file in it"):
        local_file(Source(str(tmp_path)))
    (tmp_path / "b.parquet").touch()
    (tmp_path / "a.bin").touch()
    with pytest.raises(DataError, match=r"such as .*b\.parquet"):
        local_file(Source(str(tmp_path)))


def test_a_file_of_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "data.arrow"
    path.touch()
    with pytest.raises(DataError, match=r"unknown kind.*\.jsonl, \.json, \.csv, \.txt, \.parquet"):
        local_file(Source(str(path)))


@pytest.mark.parametrize("options", [{"config": "main"}, {"split": "test"}])
def test_a_local_file_has_no_configs_and_splits(tmp_path, options):
    path = tmp_path / "a.json"
    path.touch()
    with pytest.raises(DataError, match=f"leave out {next(iter(options))}="):
        local_file(Source(str(path), **options))
