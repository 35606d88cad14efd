"""The statistics file: golden bytes, round trip, refusals, and a save that never harms what was there."""

import base64
import dataclasses
import errno
import json
import os
import stat
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.calibrate.statistics import (
    KVStatistics,
    LayerStatistics,
    Provenance,
    StreamStatistics,
)
from fp8kv.calibrate.stats_file import (
    FILE_NAME,
    encode_statistics,
    load_extra,
    load_statistics,
    save_statistics,
)
from fp8kv.recipes.errors import OutputError, StatisticsError

EXTRA = {"run": "x", "batches": 3}

GOLDEN = (
    "eNrt3dtuE0ccB2B6VNWrPkK0164VHzBOLgpVAakSPahCvSGRtXHGxMLetXY3KBRF5dH6ZnRPiRIwkDiVUMX3XSTOzsxv"
    "Z/4z68RXefXNrdrLaDJZhiI+jIt4Mol2X0az1fjZ82g3erkX5dOjsIz3ot2tXmdrL1pl6fOQxMk0VJfK9mV6GBbV672o"
    "mCcv9qKqV31xcjh/GvKiadu+oSY3zqZH8yJMi+MsNLn3Q1jlITz7c/AwzX6Kj/N48eiXtnNRhKSYp0nTc7mIm+uHxYtV"
    "O/pgtkjjojdqGrIwna9CO+286vGkTLmhvWi/vmlV28vJBzfUTHp6Q+386h1vt6rb65b1Pq0uH83zIn2axct2tw/mST5Z"
    "hWySTov4eV3F3qgeP8/yYhJOVmlSFr26/v2gXzUs4jeu94d18ixdHNaVGDe9XoSsKUx5l3lyGE7qvlVbEi/b7aqPVbfp"
    "2+1387CYTcpdTppK5EUW4mXezvTRj48f/Pr4bNrn+7y7VWTHoZ7BH7/9/uBd7aendVXCSZHFbZ/suD1IJ83tDuKifDTq"
    "2w1OT8tyRf1uc9PuedWqZ6k+buWz9PNoGHWi/Ciufnoy7vQ6453xfqc5GelslociLxu2O7fvDO/098u8PF6uFiF/T8jb"
    "w+vBZcTtwaiKKNJnIbluQjm2TBhtb+9fXFR8kC/jk4tRDwf9yytaF1bGVGGD/qWw6VGcJOVbxIdCe53B2tBBtcbRcHgp"
    "tDmDH4xcGzgc1oHjJrA6GhsveDiuosbbF6Kuvtz+2shxXcPxxdndZLHjeoY7/Qtxq3ieTZI0W143a6feiZ3Rmp1Y/xi8"
    "seC1D0Gd2Bn1+mdLbnOTNJnNk/I3wLsT1+5KnVTmDfqXz/RfIUvza2eVKVXW7f5b27H5iuu8zmi4c3am69Qr5L3zjaTO"
    "6uwMLp/ETStY55Rpd3oXV71J/eqMKqla6elW6RYAAADw0X2mBAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAHyaXikBAADwX/pqw3FftN+/3XD81+ev/rn7nm732o9CP5Rfyn737l69f9X3u3t2GAA+zb9V"
    "AODLK3ymBQB8jgQAAOD/73MlAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA+Ghev379tyoAcB2b/h/6fwG/dauL"
)
"""The file of :func:`make_statistics` and EXTRA, as written by the release that introduced schema 1 (base64, zlib)."""


def make_stream(count, width, *, rotary):
    stream = StreamStatistics.empty(1, width, has_pairs=rotary, bfloat16=True)
    stream.histogram[0, 0, 500] = count
    # the largest count that fits into 32 bits, and the smallest that does not
    stream.histogram[7, 0, 501] = 2**31 - 1 if rotary else 2**31
    stream.absmax[0, 0] = 1.5
    stream.absmax[7, 0] = 2.0
    stream.zeros[1, 0] = 3
    stream.nonfinite[2, 0] = 4
    stream.channel_absmax[0] = torch.arange(width) / 4
    stream.first_histogram[0, 499] = 5
    stream.first_absmax[0] = 0.75
    if rotary:
        stream.pair_norm[0] = 2.25
    return stream


def make_statistics():
    provenance = Provenance(
        model="tiny",
        model_digest="0" * 64,
        architecture="DeepseekV3ForCausalLM",
        attention="mla",
        dtype="bfloat16",
        recipe_digests=("a" * 64,),
        data_digests=("b" * 64, "c" * 64),
        fp8kv="0.1.0",
    )
    tokens = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    tokens[0], tokens[7] = 10, 6
    streams = {
        "LATENT": make_stream(1, 3, rotary=False),
        "ROPE": make_stream(2, 2, rotary=True),
    }
    layer = LayerStatistics(2, "model.layers.2.self_attn", streams)
    return KVStatistics(provenance, (layer,), tokens, tokens // 2)


def identical(a, b):
    """Tell whether two statistics, or parts of them, are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(identical(getattr(a, name), getattr(b, name)) for name in names)
    return a == b


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE_NAME


@pytest.fixture
def saved(path):
    save_statistics(make_statistics(), path, EXTRA)
    return path


def rewritten(path, change):
    """Write the file again after ``change`` edited its header and its tensors."""
    with safe_open(path, framework="pt") as handle:
        header = json.loads(handle.metadata()["fp8kv"])
    tensors = load(path.read_bytes())
    change(header, tensors)
    path.write_bytes(save(tensors, metadata={"fp8kv": json.dumps(header)}))


def test_the_bytes_are_the_golden_ones():
    assert encode_statistics(make_statistics(), EXTRA) == zlib.decompress(base64.b64decode(GOLDEN))


def test_the_golden_file_is_read(path):
    path.write_bytes(zlib.decompress(base64.b64decode(GOLDEN)))
    assert identical(load_statistics(path), make_statistics())
    assert load_extra(path) == EXTRA


def test_what_was_saved_is_read_back_bit_by_bit(saved):
    assert identical(load_statistics(saved), make_statistics())
    assert load_extra(saved) == EXTRA


def test_a_stream_without_rotary_pairs_has_none_after_reading(saved):
    streams = load_statistics(saved).layers[0].streams
    assert streams["LATENT"].pair_norm is None
    assert streams["ROPE"].pair_norm.tolist() == [2.25]


def test_extra_values_are_empty_unless_given(path):
    save_statistics(make_statistics(), path)
    assert load_extra(path) == {}


def test_counts_take_32_bits_where_they_fit_and_64_where_they_do_not(saved):
    tensors = load(saved.read_bytes())
    assert tensors["2.ROPE.histogram"].dtype == torch.int32
    assert tensors["2.LATENT.histogram"].dtype == torch.int64
    assert tensors["2.LATENT.zeros"].dtype == torch.int32
    streams = load_statistics(saved).layers[0].streams
    assert int(streams["ROPE"].histogram.max()) == 2**31 - 1
    assert int(streams["LATENT"].histogram.max()) == 2**31
    assert all(
        getattr(stream, field).dtype == torch.int64
        for stream in streams.values()
        for field in ("histogram", "zeros", "nonfinite", "first_histogram")
    )


def test_statistics_that_were_read_merge_like_those_that_were_measured(saved):
    other = dataclasses.replace(
        make_statistics(),
        provenance=dataclasses.replace(make_statistics().provenance, data_digests=("d" * 64,)),
    )
    assert identical(load_statistics(saved).merge(other), make_statistics().merge(other))


def test_statistics_that_lie_strided_in_memory_are_saved_too(path):
    stats = make_statistics()
    stream = stats.layers[0].streams["ROPE"]
    every_other = torch.cat([stream.absmax, stream.absmax], dim=1)[:, :1]
    assert not every_other.is_contiguous()
    strided = dataclasses.replace(stream, absmax=every_other)
    layer = dataclasses.replace(stats.layers[0], streams={"ROPE": strided})
    save_statistics(dataclasses.replace(stats, layers=(layer,)), path)
    assert torch.equal(load_statistics(path).layers[0].streams["ROPE"].absmax, stream.absmax)


def test_a_missing_file_is_named_with_the_name_to_look_for(path):
    with pytest.raises(StatisticsError) as caught:
        load_statistics(path)
    assert str(caught.value) == (
        f"{path} does not exist or is not a file; name a kv-stats.safetensors"
    )
    with pytest.raises(StatisticsError, match="is not a file"):
        load_statistics(path.parent)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no safetensors",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100],
    ],
    ids=["empty", "text", "half", "a byte short", "in the header"],
)
def test_a_truncated_or_foreign_file_is_refused(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    for read in (load_statistics, load_extra):
        with pytest.raises(StatisticsError) as caught:
            read(saved)
        assert str(caught.value).startswith(f"{saved} is not a readable safetensors file: ")


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"fp8kv": "{"}, {"fp8kv": "[]"}, {"fp8kv": '{"schema": 1}'}],
)
def test_a_safetensors_file_of_something_else_is_refused(path, metadata):
    path.write_bytes(save({"weight": torch.zeros(2)}, metadata=metadata))
    with pytest.raises(StatisticsError) as caught:
        load_statistics(path)
    assert str(caught.value) == (
        f"{path} is a safetensors file, but not one that fp8kv calibrate wrote"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 2, "has schema 2, histogram "),
        ("folds", 4, "and 4 folds; this fp8kv reads schema 1, histogram "),
        ("histogram", {"bins_per_octave": 8}, "histogram {'bins_per_octave': 8} and 8 folds"),
    ],
)
def test_another_schema_is_refused_with_both_and_the_remedy(saved, key, value, message):
    rewritten(saved, lambda header, tensors: header.update({key: value}))
    with pytest.raises(StatisticsError) as caught:
        load_statistics(saved)
    assert message in str(caught.value)
    assert str(caught.value).endswith("measure again or use the version that wrote it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: tensors.pop("2.ROPE.absmax"), "2.ROPE.absmax"),
        (lambda header, tensors: tensors.pop("tokens"), "tokens"),
        (lambda header, tensors: header.pop("layers"), "layers"),
        (lambda header, tensors: header["layers"][0].pop("name"), "name"),
        (lambda header, tensors: header.update(layers=[1]), "TypeError"),
        (lambda header, tensors: header["layers"][0].update(index="two"), "two"),
        (lambda header, tensors: header["layers"][0].update(streams=["K"]), "AttributeError"),
        (lambda header, tensors: header["provenance"].pop("dtype"), "dtype"),
        (lambda header, tensors: header["provenance"].update(mood="good"), "mood"),
        (lambda header, tensors: header.update(provenance=None), "AttributeError"),
    ],
)
def test_a_file_that_lacks_a_part_is_damaged_and_names_it(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(StatisticsError) as caught:
        load_statistics(saved)
    assert str(caught.value).startswith(f"{saved} is damaged: ")
    assert message in str(caught.value)


def test_saving_makes_the_folder_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / FILE_NAME
    save_statistics(make_statistics(), path)
    assert [entry.name for entry in path.parent.iterdir()] == [FILE_NAME]


def test_the_file_can_be_read_by_whom_the_umask_lets(path):
    before = os.umask(0o027)
    try:
        save_statistics(make_statistics(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("function", "error", "caught_as", "message"),
    [
        ("replace", OSError(errno.EACCES, "Permission denied"), OutputError, "Permission denied"),
        (
            "fsync",
            OSError(errno.ENOSPC, "No space left on device"),
            OutputError,
            "No space left on device",
        ),
        ("replace", KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(
    saved, monkeypatch, function, error, caught_as, message
):
    before = saved.read_bytes()

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(caught_as) as caught:
            save_statistics(make_statistics(), saved)
    if message:
        assert str(caught.value) == f"cannot write {saved}: {message}"
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [FILE_NAME]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / FILE_NAME
    with pytest.raises(OutputError) as caught:
        save_statistics(make_statistics(), path)
    assert str(caught.value) in (
        f"cannot write {path}: Not a directory",
        f"cannot write {path}: File exists",
    )


def test_saving_over_an_older_file_replaces_it(saved):
    stats = dataclasses.replace(make_statistics(), samples=torch.ones(8, dtype=torch.int64))
    save_statistics(stats, saved)
    assert load_statistics(saved).samples.tolist() == [1] * 8
    assert load_extra(saved) == {}
