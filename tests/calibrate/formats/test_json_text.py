"""Reading JSON with errors that name the file."""

import pytest

from fp8kv.calibrate.formats.json_text import parse_object, read_object, show
from fp8kv.recipes.errors import CheckpointError


def test_parses_an_object():
    assert parse_object(b'{"a": [1, null, "\xc3\xa9"]}', "here") == {"a": [1, None, "é"]}


def test_a_key_twice_is_refused_only_on_demand():
    assert parse_object(b'{"a": 1, "a": 2}', "here") == {"a": 2}
    with pytest.raises(CheckpointError, match="here has the key 'a' twice"):
        parse_object(b'{"a": 1, "a": 2}', "here", unique_keys=True)


def test_read_returns_the_text_unchanged(tmp_path):
    text = '{\r\n\t"a" : 1.50 }\n'
    (tmp_path / "c.json").write_bytes(text.encode())
    assert read_object(tmp_path / "c.json") == ({"a": 1.5}, text)


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*c\.json: No such file"):
        read_object(tmp_path / "c.json")


def test_show_cuts_long_values_and_escapes_what_a_terminal_cannot_print():
    assert show("a\n\ud800") == "'a\\n\\ud800'"
    assert len(show("x" * 1000)) == 80
    assert show("x" * 1000).endswith("...")
