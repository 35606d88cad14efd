"""Local files: rows, places in error messages, and everything that can be wrong with a file."""

import json
from pathlib import Path

import pytest

from fp8kv.calibrate.data import files
from fp8kv.calibrate.data.files import read_rows, read_text_blocks
from fp8kv.recipes.errors import DataError


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_rows_know_their_lines_and_blank_lines_are_no_rows(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": "two"}')
    rows = read_rows(path)
    assert [row.fields for row in rows] == [{"text": "one"}, {"text": "two"}]
    assert [row.where for row in rows] == [f"{path} line 1", f"{path} line 3"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_json_is_a_list_or_an_object_with_data(tmp_path, wrapped):
    rows = [{"text": "one"}, {"text": "two"}]
    path = written(tmp_path, "a.json", json.dumps({"data": rows} if wrapped else rows))
    assert [row.fields for row in read_rows(path)] == rows
    assert read_rows(path)[1].where == f"{path} row 2"


def test_csv_fields_may_hold_commas_and_line_ends(tmp_path):
    path = written(tmp_path, "a.csv", '\ufeffquestion,answer\r\n"a, b","c\r\nd"\r\nshort\r\n')
    rows = read_rows(path)
    assert rows[0].fields == {"question": "a, b", "answer": "c\r\nd"}
    assert rows[1].fields == {"question": "short", "answer": None}


def test_text_comes_in_blocks_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_TEXT_BLOCK_CHARS", 10)
    text = "".join(f"line {i}\n" for i in range(20)) + "end"
    blocks = list(read_text_blocks(written(tmp_path, "a.txt", text)))
    assert "".join(blocks) == text
    assert len(blocks) > 5
    assert all(block.endswith("\n") for block in blocks[:-1])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    assert read_rows(written(tmp_path, name, "")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', "line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "one"}\n["two"]\n', "line 2 is a JSON list, not an object"),
        ("a.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("a.json", "", "a.json is not valid JSON"),
        ("a.json", '{"rows": []}', "neither a list of rows nor an object whose 'data' is one"),
        ("a.json", '["one"]', "row 1 is a JSON str, not an object"),
        ("a.csv", "text\none,two\n", "line 2 has more fields than the header; quote its commas"),
        ("a.csv", 'text\n"one', "line 2 is not valid csv (unexpected end of data)"),
        ("a.csv", "text\n" + "x" * 200_000, "field larger than field limit"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8 text"),
        ("a.csv", b"text\n\xff", "is not UTF-8 text"),
    ],
)
def test_broken_rows_are_named(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = written(tmp_path, "a.txt", b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text .*convert it to UTF-8"):
        list(read_text_blocks(path))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):  # a mode of 0 would not stop root
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, "a.jsonl", "{}")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: Permission denied"):
        read_rows(path)


def test_a_file_that_vanished_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        list(read_text_blocks(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match=r"cannot read .*gone\.csv: No such file"):
        read_rows(tmp_path / "gone.csv")
