"""What holds for the whole: the names that it owns, what an import costs and does, and the manners of its files."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "fp8kv": ROOT / "fp8kv_cli",
    "fp8kv.calibrate": ROOT / "calibrate",
    "fp8kv.runtime": ROOT / "runtime",
    "fp8kv.kernels": ROOT / "kernels",
    "fp8kv.recipes": ROOT / "recipes",
}
MOST_LINES = 300

STAND_IN = '''
"""A stand-in for the Hugging Face package ``kernels``: every name that transformers asks for, none of it working."""

class _Anything:
    def __init__(self, *arguments, **options): ...

def _decorator(*arguments, **options):
    return lambda target: target

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything if name[0].isupper() else _decorator
'''


def product_files():
    """Return every file of the product rooms, docs and benchmarks, and those at the root."""
    rooms = [*PACKAGES.values(), ROOT / "docs", ROOT / "benchmarks"]
    inside = [path for room in rooms if room.exists() for path in room.rglob("*")]
    hidden = {".git", ".coverage"}
    at_root = [path for path in ROOT.iterdir() if path.name not in hidden]
    return [p for p in (*inside, *at_root) if p.is_file() and "__pycache__" not in p.parts]


def python_files():
    return sorted(path for path in product_files() if path.suffix == ".py")


def modules():
    """Return the dotted name of every module of the product."""
    names = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            if not name.endswith("__main__"):
                names.append(name)
    return names


def run_python(*arguments, cwd, **environment):
    """Run a fresh interpreter, with the working directory on its path where Python puts it there."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=inherited | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def answer_of(code, *, cwd, **environment):
    """Return what ``code`` prints last, as JSON."""
    finished = run_python("-c", code, cwd=cwd, **environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_installed_distribution_owns_no_import_name_but_its_own():
    owners = importlib.metadata.packages_distributions()
    owned = [name for name, distributions in owners.items() if "fp8kv" in distributions]
    assert owned == ["fp8kv"]
    files = importlib.metadata.files("fp8kv") or []
    tops = {file.parts[0] for file in files if file.suffix == ".py" or len(file.parts) > 2}
    assert not tops & {"calibrate", "runtime", "kernels", "recipes", "tests", "fp8kv_cli"}


def test_the_packages_that_are_installed_are_those_that_exist():
    """The list in pyproject.toml is written by hand; a folder that it forgets is missing after installation."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"packages = \[(.*?)\]", text, re.DOTALL).group(1)
    found = {
        ".".join((package, *path.parent.relative_to(folder).parts))
        for package, folder in PACKAGES.items()
        for path in folder.rglob("__init__.py")
    }
    assert set(re.findall(r'"([^"]+)"', listed)) == found


@pytest.fixture
def stand_in(tmp_path):
    """A folder with a distribution ``kernels`` in the range that the installed transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package, info = tmp_path / "kernels", tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "layer.py").write_text("")
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path


def test_transformers_in_the_repository_gets_the_kernels_package_of_that_name_not_our_folder(
    stand_in,
):
    code = """
import json, sys
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
import kernels, kernels.layer
import fp8kv.kernels
print(json.dumps({
    "available": is_kernels_available(),
    "kernels": kernels.__file__,
    "layer": kernels.layer.__file__,
    "ours": fp8kv.kernels.__file__,
    "first": sys.path[0],
}))
"""
    answer = answer_of(code, cwd=ROOT, PYTHONPATH=str(stand_in))
    assert answer["first"] == ""  # the repository root comes first, and with it our folder
    assert answer["available"] is True
    assert answer["kernels"] == str(stand_in / "kernels" / "__init__.py")
    assert answer["layer"] == str(stand_in / "kernels" / "layer.py")
    assert Path(answer["ours"]).read_bytes() == (ROOT / "kernels" / "__init__.py").read_bytes()


def test_without_the_kernels_package_our_folder_is_not_taken_for_it():
    code = """
import json
from transformers.utils.import_utils import _is_package_available
import kernels
found = _is_package_available("kernels", return_version=True)
print(json.dumps([found[1], kernels.__name__, hasattr(kernels, "CUDAProperties")]))
"""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    if "kernels" in installed:
        pytest.skip("the kernels package is installed here")
    version, name, has_names = answer_of(code, cwd=ROOT)
    assert version == "N/A"
    assert (name, has_names) == ("kernels", False)


def test_help_imports_nothing_heavy(tmp_path):
    finished = run_python("-X", "importtime", "-m", "fp8kv", "--help", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "calibrate" in finished.stdout
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in finished.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "click" in imported
    heavy = {"torch", "transformers", "rich", "numpy", "datasets", "huggingface_hub", "safetensors"}
    assert not imported & heavy


SNAPSHOT = """
import importlib, json, logging, os, random, signal, sys, threading, warnings
# what others do at their own import is theirs
import torch, transformers, datasets, safetensors.torch, pyarrow.parquet, rich.console
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

def state():
    return {
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()),
        "cuda": torch.cuda.is_initialized(),
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": [hash(random.getstate()), torch.get_rng_state().sum().item()],
        "environment": sorted(os.environ.items()),
        "handlers": [str(handler) for handler in logging.getLogger().handlers],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "python threads": threading.active_count(),
        "directory": os.getcwd(),
        "path": sys.path,
        "filters": [str(entry) for entry in warnings.filters],
    }

before = state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps([before, state()]))
"""


def test_importing_every_module_changes_nothing(tmp_path):
    finished = run_python("-c", SNAPSHOT, json.dumps(modules()), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    before, after = json.loads(finished.stdout.splitlines()[-1])
    assert after == before
    assert after["cuda"] is False
    assert not any("fp8kv" in name for name in after["attention functions"])
    assert len(finished.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# where somebody developed it is nobody's business; assembled so that a search for them finds no test
FORBIDDEN = re.compile(
    r"(?<![\w.~)}-])/(?:work|root)\b|\.\./sha"
    + r"red\b|(?<!\w)\.lib"
    + r"rary\b|/(?:home|Users)/\w"
)


@pytest.mark.parametrize("room", ["product", "tests"])
def test_no_file_says_where_it_was_developed(room):
    files = product_files() if room == "product" else [*(ROOT / "tests").rglob("*")]
    found = []
    for path in files:
        if not path.is_file() or path == Path(__file__) or "__pycache__" in path.parts:
            continue
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("see /work/notes", True),
        ("/root/.cache", True),
        ("open('../" + "shared/data')", True),
        ("/home/somebody/x", True),
        ("https://example.org/work/x", False),
        ("network/workers", False),
        ("the root/left", False),
        ("f'{folder}/work'", False),
        ("recipes.library", False),
    ],
)
def test_the_search_for_them_finds_paths_and_no_words(line, caught):
    assert bool(FORBIDDEN.search(line)) == caught


def test_no_source_file_is_long():
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()
    }
    assert {name: count for name, count in counts.items() if count >= MOST_LINES} == {}
    assert len(counts) > 50


def test_every_source_file_says_what_it_is_for():
    silent = [
        str(path.relative_to(ROOT))
        for path in [*python_files(), *(ROOT / "tests").rglob("*.py")]
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_folder_of_modules_is_a_package():
    bare = {
        str(path.parent.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert bare == set()
