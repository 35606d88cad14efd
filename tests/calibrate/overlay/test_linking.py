"""How files of the source reach the output, and which of them."""

import errno
import os
from pathlib import Path

import pytest

from fp8kv.calibrate.overlay import linking
from fp8kv.calibrate.overlay.linking import carried_files, place
from fp8kv.recipes.errors import OutputError


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_a_hard_link_shares_the_inode(weights, tmp_path):
    assert place(weights, tmp_path / "out.safetensors", "hard") == "hard"
    assert os.path.samefile(weights, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").is_symlink()


def test_a_symlink_points_to_the_file_itself_and_not_to_a_link(weights, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(weights)
    assert (
        place(tmp_path / "link.safetensors", tmp_path / "out.safetensors", "symlink") == "symlink"
    )
    assert os.readlink(tmp_path / "out.safetensors") == str(weights.resolve())


def test_a_hard_link_of_a_link_is_one_of_the_file(weights, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(weights.name)
    place(tmp_path / "link.safetensors", tmp_path / "out.safetensors", "hard")
    assert not (tmp_path / "out.safetensors").is_symlink()
    assert (tmp_path / "out.safetensors").read_bytes() == b"weights"


def test_a_copy_shares_nothing(weights, tmp_path):
    assert place(weights, tmp_path / "out.safetensors", "copy") == "copy"
    (tmp_path / "out.safetensors").write_bytes(b"other")
    assert weights.read_bytes() == b"weights"


def test_auto_falls_back_from_hard_links_to_reflinks_to_symlinks(weights, tmp_path, monkeypatch):
    refused = []

    def refuse(name, error):
        def call(*arguments, **options):
            refused.append(name)
            raise OSError(error, os.strerror(error))

        return call

    monkeypatch.setattr(linking.os, "link", refuse("hard", errno.EXDEV))
    monkeypatch.setattr(linking.fcntl, "ioctl", refuse("reflink", errno.EOPNOTSUPP))
    assert place(weights, tmp_path / "out.safetensors", "auto") == "symlink"
    assert refused == ["hard", "reflink"]


def test_a_reflink_clones_into_a_new_file(weights, tmp_path, monkeypatch):
    def clone(descriptor, request, source):
        assert request == 0x40049409
        return os.write(descriptor, os.pread(source, 100, 0))

    monkeypatch.setattr(linking.fcntl, "ioctl", clone)
    assert place(weights, tmp_path / "out.safetensors", "reflink") == "reflink"
    assert (tmp_path / "out.safetensors").read_bytes() == b"weights"
    assert not os.path.samefile(weights, tmp_path / "out.safetensors")


def test_a_link_that_the_file_system_lacks_is_refused_and_leaves_nothing(
    weights, tmp_path, monkeypatch
):
    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(linking.fcntl, "ioctl", unsupported)
    with pytest.raises(OutputError, match=r"cannot make a reflink link .* use another link mode"):
        place(weights, tmp_path / "out.safetensors", "reflink")
    assert not (tmp_path / "out.safetensors").exists()


def test_other_errors_are_not_taken_for_a_missing_link_type(weights, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"taken")
    with pytest.raises(FileExistsError):
        place(weights, tmp_path / "out.safetensors", "hard")


@pytest.mark.parametrize("mode", ["auto", "hard", "symlink", "reflink"])
def test_small_text_is_copied_so_that_editing_it_spares_the_source(tmp_path, mode):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert place(tmp_path / "tokenizer.json", tmp_path / "out.json", mode) == "copy"
    (tmp_path / "out.json").write_text("changed")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_large_files_are_linked_whatever_they_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(linking, "COPY_LIMIT_BYTES", 3)
    (tmp_path / "tokenizer.json").write_text("large")
    assert place(tmp_path / "tokenizer.json", tmp_path / "out.json", "auto") == "hard"


def test_files_are_listed_by_relative_name_with_reasons_for_the_rest(tmp_path):
    for name in [
        "a.json",
        "sub/b.py",
        "sub/optimizer.pt",
        "fp8kv/x",
        "model.safetensors",
        ".git/c",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    carried, left_out = carried_files(tmp_path, {"fp8kv/", "model.safetensors"})
    assert carried == {"a.json": tmp_path / "a.json", "sub/b.py": tmp_path / Path("sub/b.py")}
    assert left_out == {
        "sub/optimizer.pt": "a pickle, or weights in another format",
        "pipe": "not a regular file",
        "broken.txt": "not a regular file",
        "loop/": "a hidden or linked folder",
        ".git/": "a hidden or linked folder",
    }
