"""Parquet files: a seeded order, rows as Python objects, and what can be wrong with a file."""

import sys

import pyarrow
import pyarrow.parquet
import pytest

from fp8kv.calibrate.data.parquet import shuffled_parquet
from fp8kv.recipes.errors import DataError


@pytest.fixture
def path(tmp_path):
    """A file of 30 rows in several row groups, in a folder whose name looks like a partition."""
    texts = [f"row {i}" for i in range(30)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    folder = tmp_path / "split=train"
    folder.mkdir()
    table = pyarrow.table({"text": texts, "messages": messages})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


def drawn(path, seed):
    return [row.fields["text"] for row in shuffled_parquet(path, seed)]


def test_every_row_comes_once_in_a_seeded_order(path):
    texts = [f"row {i}" for i in range(30)]
    assert sorted(drawn(path, 0)) == sorted(texts)
    assert drawn(path, 0) == drawn(path, 0)
    assert texts != drawn(path, 0) != drawn(path, 1)


def test_rows_are_python_objects_that_know_their_place(path):
    for row in shuffled_parquet(path, 0):
        number = int(row.fields["text"].split()[1])
        assert row.where == f"{path} row {number + 1}"
        assert row.fields == {
            "text": f"row {number}",
            "messages": [{"role": "user", "content": f"row {number}"}],
        }


def test_a_table_without_rows_gives_none(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert list(shuffled_parquet(path, 0)) == []


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", b"PAR1" * 9])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"cannot read .*a\.parquet .*check that the file is complete"
    ):
        list(shuffled_parquet(path, 0))


def test_a_truncated_file_is_named(path):
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        list(shuffled_parquet(path, 0))


def test_without_pyarrow_the_remedy_is_to_install_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # makes the import fail
    with pytest.raises(DataError, match=r"needs the package 'pyarrow'; install it"):
        list(shuffled_parquet(path, 0))
