"""Safetensors headers: golden bytes, and the refusal of damaged and hostile ones."""

import hashlib
import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fp8kv.calibrate.formats.safetensors_file import MAX_HEADER_BYTES, TensorEntry, read_header
from fp8kv.recipes.errors import CheckpointError

# One float32 tensor "a" of shape [2], values 1.0 and -2.0, with metadata {"format": "pt"}; written by hand.
GOLDEN = bytes.fromhex(
    "5800000000000000"
    "7b225f5f6d657461646174615f5f223a7b22666f726d6174223a227074227d2c"
    "2261223a7b226474797065223a22463332222c227368617065223a5b325d2c22"
    "646174615f6f666673657473223a5b302c385d7d7d202020"
    "0000803f000000c0"
)


def raw_file(header, data=b""):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def refused(tmp_path):
    """Write bytes, read them, and return the message of the refusal."""

    def read(content):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    return read


def test_reads_golden_bytes(tmp_path):
    path = tmp_path / "golden.safetensors"
    path.write_bytes(GOLDEN)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.tensors == {"a": TensorEntry("F32", (2,), 0, 8)}
    assert header.data_start == 96
    assert header.file_size == 104
    assert header.sha256 == hashlib.sha256(GOLDEN[:96]).hexdigest()
    start = header.data_start + header.tensors["a"].start
    assert struct.unpack("<2f", GOLDEN[start : start + 8]) == (1.0, -2.0)


def test_reads_what_the_reference_library_writes(tmp_path):
    tensors = {
        "weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        "codes": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "packed": torch.zeros(2, 2, dtype=torch.int32),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 7),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    header = read_header(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "weight": ("BF16", (3, 5)),
        "codes": ("F8_E4M3", (4,)),
        "packed": ("I32", (2, 2)),
        "scalar": ("F32", ()),
        "empty": ("F32", (0, 7)),
    }
    assert header.metadata == {}


def test_hash_changes_with_the_header_and_not_with_the_weights(tmp_path):
    hashes = []
    for name, value in (("a", 1.0), ("a", 2.0), ("b", 1.0)):
        path = tmp_path / "model.safetensors"
        save_file({name: torch.tensor(value)}, path)
        hashes.append(read_header(path).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist; download"):
        read_header(tmp_path / "gone.safetensors")


def test_directory_in_place_of_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOLDEN)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied; check the file"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short(refused, size):
    assert f"too short to be a safetensors file: {size} bytes" in refused(GOLDEN[:size])


def test_git_lfs_pointer(refused):
    assert "Git LFS pointer" in refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
    )


def test_header_beyond_the_end_of_the_file(refused):
    assert "truncated: 38 bytes of its 88-byte header are missing" in refused(GOLDEN[:58])


def test_header_beyond_the_limit(refused):
    message = refused(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    assert "claims 100000001 bytes (limit 100000000)" in message


def test_absurd_header_length_is_refused_without_allocating_it(refused):
    assert "claims 18446744073709551615 bytes" in refused(b"\xff" * 64)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"a\xff": 1}', "is not UTF-8 (byte 3)"),
        (b'{"a": ', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[]", "holds a JSON list where an object belongs"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": {}, "a": {}}', "has the key 'a' twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "has the key 'dtype' twice"),
    ],
)
def test_broken_header_text(refused, body, expected):
    assert expected in refused(raw_file(body))


@pytest.mark.parametrize("metadata", [[], "pt", {"format": 1}, {"format": None}])
def test_metadata_that_is_no_object_of_strings(refused, metadata):
    assert "not an object of strings" in refused(raw_file({"__metadata__": metadata}))


@pytest.mark.parametrize(
    "fields",
    [None, [], "F32", {}, {"dtype": "F32", "shape": []}, {**tensor(), "extra": 1}],
)
def test_tensor_without_its_three_fields(refused, fields):
    message = refused(raw_file({"a": fields}, bytes(4)))
    assert "tensor 'a' of" in message
    assert "not by dtype, shape and data_offsets" in message


@pytest.mark.parametrize("dtype", ["F99", "f32", "", None, 3, ["F32"]])
def test_unknown_dtype(refused, dtype):
    message = refused(raw_file({"a": {**tensor(), "dtype": dtype}}, bytes(4)))
    assert "tensor 'a' of" in message
    assert f"unknown dtype {dtype!r}" in message


@pytest.mark.parametrize("shape", [[-1], [True], [1.0], ["1"], [None], [[1]], 1, {"0": 1}, [2**63]])
def test_shape_that_is_no_list_of_counts(refused, shape):
    message = refused(raw_file({"a": {**tensor(), "shape": shape}}, bytes(4)))
    assert f"has the shape {shape!r}, not a list of non-negative integers" in message


@pytest.mark.parametrize("offsets", [[-4, 0], [False, 4], [0.0, 4.0], "04", [0, 2**64]])
def test_offsets_that_are_no_counts(refused, offsets):
    message = refused(raw_file({"a": {**tensor(), "data_offsets": offsets}}, bytes(4)))
    assert f"has the data_offsets {offsets!r}, not a list of non-negative integers" in message


@pytest.mark.parametrize("offsets", [[], [0], [0, 4, 8], [4, 0]])
def test_offsets_that_are_no_range(refused, offsets):
    message = refused(raw_file({"a": tensor(offsets=offsets)}, bytes(4)))
    assert "which are no byte range" in message


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62, 2), (2**62, 2**62, 0)])
def test_dimensions_that_overflow(refused, shape):
    assert "larger than any file can hold" in refused(
        raw_file({"a": tensor(shape=shape)}, bytes(4))
    )


def test_range_that_does_not_fit_the_shape(refused):
    message = refused(raw_file({"a": tensor("BF16", (3, 5), (0, 32))}, bytes(32)))
    assert "needs 30 bytes for BF16 [3, 5] but its byte range has 32" in message


def test_half_bytes(refused):
    message = refused(raw_file({"a": tensor("F4", (3,), (0, 1))}, bytes(1)))
    assert "needs 1.5 bytes for F4 [3]" in message


def test_overlap_names_both_tensors(refused):
    header = {"a": tensor(), "b": tensor(offsets=(2, 6))}
    assert "tensors 'a' and 'b' of" in refused(raw_file(header, bytes(6)))


def test_tensors_with_the_same_range_overlap(refused):
    assert "overlap" in refused(raw_file({"a": tensor(), "b": tensor()}, bytes(4)))


def test_hole_between_tensors(refused):
    header = {"a": tensor(), "b": tensor(offsets=(12, 16))}
    assert "has a hole of 8 bytes before tensor 'b'" in refused(raw_file(header, bytes(16)))


def test_hole_before_the_first_tensor(refused):
    assert "hole of 4 bytes" in refused(raw_file({"a": tensor(offsets=(4, 8))}, bytes(8)))


def test_truncated_download_says_how_much_is_missing(refused):
    assert "truncated: 3 of 104 bytes are missing; download it again" in refused(GOLDEN[:-3])


def test_bytes_after_the_last_tensor(refused):
    assert "has 2 bytes after its last tensor" in refused(GOLDEN + b"\0\0")


def test_file_that_shrinks_while_it_is_read(refused, monkeypatch):
    real = os.stat_result

    def grown(self, **kwargs):
        status = list(os.stat(self, **kwargs))
        status[6] += 1000
        return real(status)

    monkeypatch.setattr("pathlib.Path.stat", grown)
    assert "shrank while it was read" in refused(struct.pack("<Q", 500) + b"{}")


def test_hostile_names_do_not_flood_the_message(refused):
    message = refused(raw_file({"a" * 100_000 + "\n": tensor("F99")}, bytes(4)))
    assert len(message) < 1000


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F8_E4M3", "?", None]),
        "shape": st.lists(st.integers(-2, 2**70) | st.integers(0, 4) | st.booleans(), max_size=4),
        "data_offsets": st.lists(st.integers(-2, 64) | st.floats(), max_size=3),
    },
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.binary(max_size=200)
    | st.builds(lambda body: struct.pack("<Q", len(body)) + body, st.binary(max_size=200))
    | st.builds(
        lambda header, data: raw_file(header, data),
        st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), FIELDS, max_size=4),
        st.binary(max_size=64),
    )
    | st.builds(
        lambda position, byte: GOLDEN[:position] + bytes([byte]) + GOLDEN[position + 1 :],
        st.integers(0, len(GOLDEN) - 1),
        st.integers(0, 255),
    )
)
@example(content=raw_file(b'{"\\ud800": 1}'))
def test_arbitrary_bytes_are_read_or_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    message = None
    try:
        header = read_header(path)
    except CheckpointError as error:
        message = str(error)
    if message is not None:
        assert str(path) in message
        assert message.encode()
    else:
        # What is accepted is consistent: the ranges fill the data section exactly.
        sizes = sum(entry.end - entry.start for entry in header.tensors.values())
        assert header.data_start + sizes == header.file_size == len(content)


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, len(GOLDEN) - 1))
def test_every_truncation_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    path.write_bytes(GOLDEN[:cut])
    with pytest.raises(CheckpointError, match=r"truncated|too short"):
        read_header(path)
