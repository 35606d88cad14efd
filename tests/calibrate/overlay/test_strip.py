"""Stripping gives the source back, from any point, and loses nothing that is not fp8kv's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.overlay import strip as strip_module
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.overlay.strip import strip
from fp8kv.calibrate.overlay.writer import write_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes.errors import CheckpointError, OutputError

SOURCES = Path(__file__).parents[1] / "golden" / "sources"
# A sharded one, a single file, and those that have other files created and edited.
BASES = [
    ("llama-bf16", "vllm"),
    ("qwen2-bf16", "vllm"),
    ("llama-bf16", "modelopt"),
    ("llama-modelopt", "modelopt"),
    ("deepseek-fp8", "vllm"),
]


def convert(source, out, target="vllm", link="auto"):
    checkpoint = open_checkpoint(source)
    facts = model_facts(checkpoint)
    layers = tuple(LayerScales(layer.index, layer.name, (0.5,), (0.5,)) for layer in facts.layers)
    scales = ScaleSet(facts.attention, "e4m3fn", "tensor", layers)
    extra = {"kv-stats.safetensors": b"statistics", "recipe.yaml": b"schema: 1\n"}
    write_overlay(plan_overlay(checkpoint, facts, scales, [target], extra), out, link=link)


def content(directory):
    files = (path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("base", "target"), BASES)
@pytest.mark.parametrize("link", ["hard", "symlink", "copy"])
def test_strip_gives_back_the_source(tmp_path, base, target, link):
    before = content(SOURCES / base)
    convert(SOURCES / base, tmp_path / "out", target, link)
    assert content(tmp_path / "out") != before
    report = strip(tmp_path / "out")
    assert content(tmp_path / "out") == before
    assert not (tmp_path / "out" / "fp8kv").exists()
    assert content(SOURCES / base) == before
    assert "model-kv-scales.safetensors" in report.removed
    assert "config.json" in report.restored
    assert report.kept == ()
    assert report.directory == tmp_path / "out"


def test_files_in_our_folder_that_are_not_ours_stay_and_are_named(tmp_path):
    convert(SOURCES / "llama-bf16", tmp_path / "out")
    (tmp_path / "out" / "fp8kv" / "notes.txt").write_text("mine")
    assert strip(tmp_path / "out").kept == ("fp8kv/notes.txt",)
    assert (tmp_path / "out" / "fp8kv" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("base", ["llama-bf16", "qwen2-bf16"])
def test_a_file_that_was_edited_since_is_not_lost(tmp_path, base, name):
    convert(SOURCES / base, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_text(path.read_text() + " ")
    before = content(tmp_path / "out")
    with pytest.raises(
        OutputError, match=rf"{name} was changed after fp8kv wrote it.*put the change"
    ):
        strip(tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_foreign_scales_are_refused_with_the_reason(tmp_path):
    shutil.copytree(SOURCES / "llama-int4", tmp_path / "foreign")
    path = tmp_path / "foreign" / "model.safetensors"
    tensors = load_file(path) | {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(OutputError, match=r"1 KV scale tensors but no fp8kv/manifest\.json"):
        strip(tmp_path / "foreign")


def test_a_checkpoint_without_scales_has_nothing_to_strip():
    with pytest.raises(OutputError, match="there is nothing to strip"):
        strip(SOURCES / "llama-int4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"schema": 2}', "has schema 2, and this fp8kv knows 1"),
        ('{"schema": 1}', "is damaged"),
    ],
)
def test_a_broken_manifest_is_refused_before_anything_happens(tmp_path, text, message):
    convert(SOURCES / "llama-bf16", tmp_path / "out")
    (tmp_path / "out" / "fp8kv" / "manifest.json").write_text(text)
    before = content(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        strip(tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_file_system_without_hard_links_gets_the_shard_renamed(tmp_path, monkeypatch):
    convert(SOURCES / "qwen2-bf16", tmp_path / "out")

    def refuse(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr(strip_module.os, "link", refuse)
    strip(tmp_path / "out")
    assert content(tmp_path / "out") == content(SOURCES / "qwen2-bf16")


def test_a_file_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    convert(SOURCES / "llama-bf16", tmp_path / "out")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(strip_module.os, "unlink", refuse)
    with pytest.raises(OutputError, match=r"Permission denied .*it still loads: .*run strip again"):
        strip(tmp_path / "out")


def test_the_empty_folder_of_a_run_killed_at_the_end_is_removed(tmp_path):
    shutil.copytree(SOURCES / "llama-int4", tmp_path / "out")
    (tmp_path / "out" / "fp8kv").mkdir()
    strip(tmp_path / "out")
    assert content(tmp_path / "out") == content(SOURCES / "llama-int4")
    assert not (tmp_path / "out" / "fp8kv").exists()


def names_in(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return set(json.loads(path.read_bytes()[8 : 8 + length])) - {"__metadata__"}


def seen_by_transformers(directory):
    if (directory / "model.safetensors").exists():
        return names_in(directory / "model.safetensors")
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    missing = [
        name for name, shard in weight_map.items() if name not in names_in(directory / shard)
    ]
    return set() if missing else set(weight_map)


def seen_by_an_engine(directory, follows_index):
    files = {path.name for path in directory.glob("*.safetensors")}
    index = directory / "model.safetensors.index.json"
    if follows_index and index.exists():
        files &= set(json.loads(index.read_text())["weight_map"].values())
    return set().union(*(names_in(directory / file) for file in files))


def problems_of_readers(directory, base_names):
    """What would stop a reader: a missing weight, or scales that the config does not announce."""
    config = json.loads((directory / "config.json").read_text())
    problems = []
    for reader, names in {
        "transformers": seen_by_transformers(directory),
        "engine": seen_by_an_engine(directory, follows_index=True),
        "engine that takes every file": seen_by_an_engine(directory, follows_index=False),
    }.items():
        if base_names - names:
            problems.append(f"{reader} misses weights")
        if names - base_names and "quantization_config" not in config:
            problems.append(f"{reader} finds scales without a config for them")
    return problems


KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_strip as here
from fp8kv.calibrate.overlay.strip import strip

def killed_at(step, out):
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
        for name in ("link", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        strip(out)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def kill_everywhere(base, target, work):
    source = here.SOURCES / base
    here.convert(source, work / "converted", target)
    base_names = here.seen_by_an_engine(source, follows_index=True)
    steps = []
    while True:
        shutil.copytree(work / "converted", work / "out")
        if not killed_at(len(steps) + 1, work / "out"):
            return steps
        problems = here.problems_of_readers(work / "out", base_names)
        strip(work / "out")
        restored = here.content(work / "out") == here.content(source)
        steps.append({"problems": problems, "restored": restored})
        shutil.rmtree(work / "out")

work = Path(sys.argv[2])
print(json.dumps([
    kill_everywhere(base, target, work / f"{base}-{target}")
    for base, target in [("llama-bf16", "modelopt"), ("qwen2-bf16", "vllm")]
]))
"""


def test_kill_9_at_any_point_leaves_a_loadable_directory_that_strips_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLER, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for steps in json.loads(done.stdout):
        assert len(steps) >= 8
        assert steps == [{"problems": [], "restored": True}] * len(steps)
