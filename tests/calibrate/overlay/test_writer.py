"""Writing a planned checkpoint: the whole or nothing, and the source untouched."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.formats.kv_names import find_kv_scales
from fp8kv.calibrate.overlay import writer
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.overlay.writer import check_output, write_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.calibrate.validation.validate import validate
from fp8kv.recipes.errors import OutputError

SOURCES = Path(__file__).parents[1] / "golden" / "sources"


def plan_for(path, targets=("vllm", "sglang")):
    checkpoint = open_checkpoint(path)
    facts = model_facts(checkpoint)
    layers = tuple(
        LayerScales(layer.index, layer.name, (2.0**-6,), (2.0**-6,)) for layer in facts.layers
    )
    scales = ScaleSet(facts.attention, "e4m3fn", "tensor", layers)
    return plan_overlay(checkpoint, facts, scales, targets, {"recipe.yaml": b"schema: 1\n"})


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(SOURCES / "llama-bf16", tmp_path / "source"))


def state(directory):
    """Content, time of change and inode of every file."""
    return {
        path.relative_to(directory).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
            path.stat().st_ino,
        )
        for path in directory.rglob("*")
        if path.is_file()
    }


BASES = ["llama-bf16", "qwen2-bf16", "minimax-fp8", "llama-int4", "deepseek-fp8", "kimi-int4"]


@pytest.mark.parametrize("base", BASES)
def test_what_is_written_reads_back_and_validates(tmp_path, base):
    plan = plan_for(SOURCES / base)
    write_overlay(plan, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    found = {scale.tensor: scale.value for scale in find_kv_scales(written)}
    assert found.keys() == plan.tensors.keys()
    assert all(torch.equal(found[name], plan.tensors[name].flatten()) for name in found)
    assert [check for check in validate(tmp_path / "out") if not check.passed] == []
    assert (tmp_path / "out" / "fp8kv" / "recipe.yaml").read_bytes() == b"schema: 1\n"
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("mode", ["auto", "hard", "symlink", "copy"])
def test_no_link_mode_touches_the_source(tmp_path, source, mode):
    before = state(source)
    report = write_overlay(plan_for(source), tmp_path / "out", link=mode)
    assert state(source) == before
    way = "hard" if mode == "auto" else mode
    assert report.placed[way] >= 2
    shards = list((tmp_path / "out").glob("model-0*"))
    assert [path.is_symlink() for path in shards] == [mode == "symlink"] * 2
    for path in shards:
        assert os.path.samefile(path, source / path.name) == (mode != "copy")


def test_a_reflink_where_there_is_none_is_refused_and_leaves_nothing(tmp_path, source, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", unsupported)
    with pytest.raises(OutputError, match="cannot make a reflink link"):
        write_overlay(plan_for(source), tmp_path / "out", link="reflink")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_missing_parents_of_the_output_are_made(tmp_path, source):
    write_overlay(plan_for(source), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").exists()


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_output_is_never_overwritten(tmp_path, source, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="out exists, and fp8kv never overwrites"):
        write_overlay(plan_for(source), out)


def test_the_source_itself_and_places_inside_it_are_refused(tmp_path, source):
    plan = plan_for(source)
    with pytest.raises(OutputError, match="is the source itself"):
        write_overlay(plan, source)
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(OutputError, match="is the source itself"):
        write_overlay(plan, tmp_path / "alias")
    with pytest.raises(OutputError, match="lies inside the source"):
        write_overlay(plan, source / "sub" / "out")
    with pytest.raises(OutputError, match="lies inside the source"):
        write_overlay(plan, tmp_path / "alias" / "out")


def test_the_place_can_be_checked_before_there_is_anything_to_write(tmp_path, source):
    check_output(source, tmp_path / "out")
    with pytest.raises(OutputError, match="fp8kv never overwrites"):
        check_output(SOURCES, source)


def test_a_full_disk_is_said_and_cleaned_up(tmp_path, source, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "fsync", full)
    before = state(source)
    with pytest.raises(
        OutputError, match="No space left on device; the partial output was removed, the source is"
    ):
        write_overlay(plan_for(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert state(source) == before


def test_a_partial_output_that_cannot_be_removed_is_named(tmp_path, source, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "fsync", full)
    monkeypatch.setattr(writer.shutil, "rmtree", lambda path, ignore_errors=False: None)
    with pytest.raises(OutputError, match=r"\.out\.fp8kv-partial-\w{8} could not be removed"):
        write_overlay(plan_for(source), tmp_path / "out")


def test_a_parent_that_cannot_be_made_is_said(tmp_path, source):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write .*; nothing was written"):
        write_overlay(plan_for(source), tmp_path / "file" / "out")


def test_copies_that_cannot_fit_are_refused_before_anything_is_written(
    tmp_path, source, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"0\.0 GB are free; free some space, or link them"):
        write_overlay(plan_for(source), tmp_path / "out", link="copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("interrupted", ["rename", "link", "fsync"])
def test_an_interrupt_cleans_up_and_goes_on_as_an_interrupt(
    tmp_path, source, monkeypatch, interrupted
):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.os, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_overlay(plan_for(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, source):
    plan = plan_for(source)
    shutil.copy(source / "model-00002-of-00002.safetensors", tmp_path / "second")
    other = open_checkpoint(SOURCES / "minimax-fp8").shards["model-00002-of-00002.safetensors"]
    shards = dict(plan.checkpoint.shards) | {"model-00002-of-00002.safetensors": other}
    changed = replace(plan, checkpoint=replace(plan.checkpoint, shards=shards))
    with pytest.raises(
        OutputError, match=r"does not read back: model-00002-of-00002\.safetensors is"
    ):
        write_overlay(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_read_back_differently_are_noticed(tmp_path, source):
    plan = plan_for(source)
    name = next(iter(plan.tensors))
    tampered = replace(plan, tensors=dict(plan.tensors) | {name: torch.tensor([0.5])})
    with pytest.raises(OutputError, match=f"does not read back: {name} differs"):
        write_overlay(tampered, tmp_path / "out")


def test_an_output_that_does_not_open_is_never_published(tmp_path, source):
    plan = replace(plan_for(source), index_text="{}")
    with pytest.raises(OutputError, match=r"what was written does not open: .*has no weight_map"):
        write_overlay(plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_killed_runs_leftover_goes_and_other_directories_stay(tmp_path, source):
    stale = tmp_path / ".out.fp8kv-partial-0123abcd"
    others = [
        ".out2.fp8kv-partial-0123abcd",
        ".out.fp8kv-partial-",
        ".out.fp8kv-partial-0123abcd.x",
    ]
    for path in [stale, *(tmp_path / name for name in others)]:
        path.mkdir()
        (path / "x").write_text("x")
    write_overlay(plan_for(source), tmp_path / "out")
    assert not stale.exists()
    assert all((tmp_path / name / "x").exists() for name in others)


def test_a_run_that_still_writes_the_same_output_is_left_alone(tmp_path, source):
    busy = tmp_path / ".out.fp8kv-partial-0123abcd"
    busy.mkdir()
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match=r"another fp8kv is writing .*0123abcd\); wait"):
            write_overlay(plan_for(source), tmp_path / "out")
    finally:
        os.close(descriptor)
    assert busy.exists()


KILLER = """
import os, signal, sys, json, shutil
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_writer as here
from fp8kv.calibrate.overlay.writer import write_overlay
from fp8kv.calibrate.validation.validate import validate

work = Path(sys.argv[2])
plan = here.plan_for(work / "source")
out = work / "out"

def killed_at(step):
    child = os.fork()
    if child == 0:
        count = 0
        def deadly(call):
            def inner(*arguments, **options):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)
            return inner
        for name in ("mkdir", "open", "link", "fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        write_overlay(plan, out)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

steps = []
step = 1
while killed_at(step):
    left = sorted(path.name for path in work.iterdir() if path.name != "source")
    whole = out.exists() and all(check.passed for check in validate(out))
    if out.exists():
        shutil.rmtree(out)
    write_overlay(plan, out)
    after = sorted(path.name for path in work.iterdir() if path.name != "source")
    sound = all(check.passed for check in validate(out))
    shutil.rmtree(out)
    steps.append({"left": left, "whole": whole, "after": after, "sound": sound})
    step += 1
print(json.dumps(steps))
"""


def test_kill_9_at_any_point_leaves_nothing_or_the_whole(tmp_path, source):
    before = state(source)
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLER, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert len(steps) > 20
    outcomes = set()
    for step in steps:
        if "out" in step["left"]:
            assert step["left"] == ["out"]
            assert step["whole"]
            outcomes.add("whole")
        else:
            assert all(name.startswith(".out.fp8kv-partial-") for name in step["left"])
            outcomes.add("partial" if step["left"] else "nothing")
        assert step["after"] == ["out"]
        assert step["sound"]
    assert outcomes == {"nothing", "partial", "whole"}
    assert state(source) == before


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_transformers_loads_the_scales_where_it_expects_them(tmp_path, attention):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    if attention == "gqa":
        config = transformers.LlamaConfig(**common, num_key_value_heads=2)
    else:
        config = transformers.DeepseekV3Config(
            **common,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=2,
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    write_overlay(plan_for(tmp_path / "source", ["transformers"]), tmp_path / "out")

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for layer in loaded.model.layers:
        assert layer.self_attn.k_scale.tolist() == [2.0**-6]
        assert layer.self_attn.v_scale.tolist() == [2.0**-6]
    weights = dict(model.named_parameters())
    for name, value in loaded.named_parameters():
        if not name.endswith(("k_scale", "v_scale")):
            assert torch.equal(value, weights[name])
